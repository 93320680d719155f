//! A report in the making: takes the rows of a file one after the other.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::Row;
use super::encode::EncodeError;
use super::judge::JudgedRow;
use super::report::{Format, LengthBin, Repeats, Report};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Different rows that are remembered, so that the memory for them is bounded (some 64 MB).
const REMEMBERED_ROWS: usize = 1 << 22;
/// Rows that are searched for control tokens.
const SEARCHED_ROWS: u64 = 256;
/// The upper bound of the histogram's first bin; each bin is twice as wide as the one before.
const FIRST_BIN: u64 = 32;

/// What tells the rows of a set apart: eight bytes a row, of the first four million different ones.
#[derive(Debug, Clone, Default)]
pub struct RowHashes(HashSet<u64>);

impl RowHashes {
    fn contains(&self, hash: u64) -> bool {
        self.0.contains(&hash)
    }

    /// Whether a row was there already; adds it.
    fn repeats(&mut self, hash: u64) -> bool {
        if self.0.len() < REMEMBERED_ROWS { !self.0.insert(hash) } else { self.contains(hash) }
    }
}

/// What two rows have in common that are the same to the model.
pub(super) fn hash(row: &Row) -> u64 {
    let mut hasher = DefaultHasher::new();
    row.tokens.hash(&mut hasher);
    hasher.finish()
}

/// A report in the making.
pub(super) struct Tally<'a> {
    report: Report,
    rows: RowHashes,
    /// Rows of the set that this one should have nothing in common with.
    other: Option<&'a RowHashes>,
    /// Rows by their number of tokens before the cut.
    lengths: BTreeMap<u64, u64>,
    control_tokens: BTreeSet<u32>,
    tokenizer: &'a Tokenizer,
    max_seq_length: usize,
}

impl<'a> Tally<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, max_seq_length: usize, other: Option<&'a RowHashes>) -> Self {
        let overlap = other.map(|_| Repeats::default());
        Self {
            report: Report { overlap, ..Report::default() },
            rows: RowHashes::default(),
            other,
            lengths: BTreeMap::new(),
            control_tokens: BTreeSet::new(),
            tokenizer,
            max_seq_length,
        }
    }

    /// Takes a row; gives it back, cut, where it can be trained on.
    ///
    /// # Errors
    /// The template's or tokenizer's fault.
    pub(super) fn add(&mut self, judged: JudgedRow, format: Option<Format>) -> Result<Option<Row>> {
        let JudgedRow { line, row, ignored, lost_characters, tokens, hash } = judged;
        let report = &mut self.report;
        report.format = format;
        report.rows += 1;
        for name in ignored {
            report.add_ignored_field(name);
        }
        let mut tokens = match tokens {
            Ok(tokens) => tokens,
            Err(EncodeError::Row(problem)) => {
                report.add_bad_row(problem.at(line, row));
                return Ok(None);
            }
            Err(EncodeError::NoMask(message) | EncodeError::Fatal(Error::Template(message))) => {
                return Err(Error::Template(format!("{message} (seen at line {line} of the data set)")));
            }
            Err(EncodeError::Fatal(error)) => return Err(error),
        };
        report.lost_characters += lost_characters as u64;
        if report.rows <= SEARCHED_ROWS {
            let control = tokens.tokens.iter().filter(|&&id| self.tokenizer.is_control(id));
            self.control_tokens.extend(control);
        }
        if self.rows.repeats(hash) {
            report.duplicates.add(line);
        }
        if let (Some(other), Some(overlap)) = (self.other, &mut report.overlap)
            && other.contains(hash)
        {
            overlap.add(line);
        }
        *self.lengths.entry(tokens.tokens.len() as u64).or_default() += 1;
        if tokens.tokens.len() > self.max_seq_length {
            report.truncated_rows += 1;
            tokens.truncate(self.max_seq_length);
        }
        let trained = tokens.trained_tokens() as u64;
        if trained == 0 {
            report.dropped_rows += 1;
            return Ok(None);
        }
        report.tokens += tokens.tokens.len() as u64;
        report.trained_tokens += trained;
        Ok((report.bad_row_count == 0).then_some(tokens))
    }

    /// The report, and what tells its rows apart.
    pub(super) fn finish(self) -> (Report, RowHashes) {
        let Self { mut report, rows, lengths, control_tokens, .. } = self;
        report.longest = lengths.keys().next_back().copied().unwrap_or(0);
        report.p50 = percentile(&lengths, 50);
        report.p95 = percentile(&lengths, 95);
        report.histogram = histogram(&lengths);
        report.control_tokens = control_tokens.into_iter().collect();
        (report, rows)
    }
}

/// The least length that so many percent of the rows do not exceed; 0 where there are no rows.
fn percentile(lengths: &BTreeMap<u64, u64>, percent: u64) -> u64 {
    let rows: u64 = lengths.values().sum();
    let rank = (rows * percent).div_ceil(100);
    let mut below = 0;
    let mut at_rank = lengths.iter().skip_while(|(_, rows)| {
        below += **rows;
        below < rank
    });
    at_rank.next().map_or(0, |(&length, _)| length)
}

fn histogram(lengths: &BTreeMap<u64, u64>) -> Vec<LengthBin> {
    let mut bins: Vec<LengthBin> = Vec::new();
    for (&length, &rows) in lengths {
        while bins.last().is_none_or(|bin| bin.up_to < length) {
            let up_to = bins.last().map_or(FIRST_BIN, |bin| bin.up_to * 2);
            bins.push(LengthBin { up_to, rows: 0 });
        }
        if let Some(bin) = bins.last_mut() {
            bin.rows += rows;
        }
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_bins_count_every_row() {
        let lengths: BTreeMap<u64, u64> = (1..=100).map(|length| (length, 1)).collect();
        assert_eq!((percentile(&lengths, 50), percentile(&lengths, 95), percentile(&lengths, 100)), (50, 95, 100));
        let bins: Vec<(u64, u64)> = histogram(&lengths).iter().map(|bin| (bin.up_to, bin.rows)).collect();
        assert_eq!(bins, [(32, 32), (64, 32), (128, 36)]);
        let one = BTreeMap::from([(200, 7)]);
        assert_eq!((percentile(&one, 50), percentile(&one, 95)), (200, 200));
        assert_eq!(histogram(&one).iter().map(|bin| bin.rows).collect::<Vec<_>>(), [0, 0, 0, 7]);
        assert_eq!((percentile(&BTreeMap::new(), 50), histogram(&BTreeMap::new()).len()), (0, 0));
    }
}
