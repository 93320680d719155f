//! Merging neighbours, the best pair first: what byte-level BPE and SentencePiece have in common.
//!
//! The pieces of a text form a list. A queue holds the pairs that may be merged, the best (lowest order, then leftmost) first;
//! a merge puts at most two new pairs into it, so that n pieces take O(n log n) whatever the text.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{BuildHasherDefault, Hasher};

/// In place of a token: the piece is none.
pub(super) const NO_TOKEN: u32 = u32::MAX;
/// In place of a neighbour: there is none.
const END: u32 = u32::MAX;

/// A piece of a text, and its neighbours in the list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// Where it begins and ends in the text, in bytes.
    pub(super) start: u32,
    pub(super) end: u32,
    /// The token that it is.
    pub(super) token: u32,
    previous: u32,
    next: u32,
}

impl Piece {
    /// Its bytes in the text.
    pub(super) fn of<'a>(&self, text: &'a [u8]) -> &'a [u8] {
        &text[self.start as usize..self.end as usize]
    }
}

/// What two neighbours become.
#[derive(Debug, Clone, Copy)]
pub(super) struct Merged {
    /// Merges of a lower order come first.
    pub(super) order: u32,
    /// The token of the two together.
    pub(super) token: u32,
}

/// A pair in the queue. It is stale once one of the two has grown or gone, which their length tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    order: u32,
    left: u32,
    right: u32,
    length: u32,
    token: u32,
}

/// The pieces of one text; its memory is used again for the next.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    list: Vec<Piece>,
    queue: BinaryHeap<Reverse<Pair>>,
}

impl Pieces {
    /// Forgets the last text.
    pub(super) fn clear(&mut self) {
        self.list.clear();
        self.queue.clear();
    }

    /// Puts a piece of that many bytes at the end.
    pub(super) fn push(&mut self, length: usize, token: u32) {
        let index = self.list.len() as u32;
        let start = self.list.last().map_or(0, |last| last.end);
        let previous = match self.list.last_mut() {
            None => END,
            Some(last) => {
                last.next = index;
                index - 1
            }
        };
        self.list.push(Piece { start, end: start + length as u32, token, previous, next: END });
    }

    /// Merges until no pair of neighbours can be.
    pub(super) fn merge(&mut self, join: impl Fn(&Piece, &Piece) -> Option<Merged>) {
        for left in 1..self.list.len() as u32 {
            self.offer(left - 1, left, &join);
        }
        while let Some(Reverse(pair)) = self.queue.pop() {
            let (left, right) = (self.list[pair.left as usize], self.list[pair.right as usize]);
            let is_gone = left.start == left.end || right.start == right.end;
            if is_gone || right.end - left.start != pair.length || left.next != pair.right {
                continue;
            }
            self.list[pair.left as usize] = Piece { end: right.end, token: pair.token, next: right.next, ..left };
            self.list[pair.right as usize].end = right.start;
            if right.next != END {
                self.list[right.next as usize].previous = pair.left;
            }
            self.offer(left.previous, pair.left, &join);
            self.offer(pair.left, right.next, &join);
        }
    }

    /// The pieces that are left, in the text's order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Piece> {
        let first = self.list.first();
        std::iter::successors(first, |piece| self.list.get(piece.next as usize))
    }

    fn offer(&mut self, left: u32, right: u32, join: &impl Fn(&Piece, &Piece) -> Option<Merged>) {
        if left == END || right == END {
            return;
        }
        let (one, other) = (&self.list[left as usize], &self.list[right as usize]);
        if let Some(Merged { order, token }) = join(one, other) {
            let length = other.end - one.start;
            self.queue.push(Reverse(Pair { order, left, right, length, token }));
        }
    }
}

/// A quick hash for tables that only a model file fills: no text that is looked up can make them slow for others.
#[derive(Debug, Default)]
pub(super) struct QuickHash(u64);

/// Makes [`QuickHash`]es.
pub(super) type Quick = BuildHasherDefault<QuickHash>;

impl Hasher for QuickHash {
    fn write(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            self.write_u64(chunk.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)));
        }
        let rest = chunks.remainder();
        if !rest.is_empty() {
            self.write_u64(rest.iter().fold(rest.len() as u64, |word, &byte| word << 8 | u64::from(byte)));
        }
    }

    fn write_u64(&mut self, word: u64) {
        // The odd number nearest to 2^64 divided by the golden ratio: its bits are spread evenly.
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text's characters, merged where both are letters of the list, in the list's order.
    fn merged(text: &str, pairs: &[&str]) -> Vec<String> {
        let mut pieces = Pieces::default();
        text.bytes().for_each(|_| pieces.push(1, NO_TOKEN));
        let bytes = text.as_bytes();
        pieces.merge(|left, right| {
            let both = &bytes[left.start as usize..right.end as usize];
            let order = pairs.iter().position(|pair| pair.as_bytes() == both)?;
            Some(Merged { order: order as u32, token: order as u32 })
        });
        pieces.iter().map(|piece| String::from_utf8_lossy(piece.of(bytes)).into_owned()).collect()
    }

    #[test]
    fn the_best_pair_is_merged_first_and_of_equals_the_leftmost() {
        assert_eq!(merged("abcab", &["ab", "bc"]), ["ab", "c", "ab"]);
        assert_eq!(merged("abcab", &["bc", "ab"]), ["a", "bc", "ab"]);
        assert_eq!(merged("aaaaa", &["aa", "aaaa"]), ["aaaa", "a"]);
        assert_eq!(merged("abab", &["ab", "aba"]), ["ab", "ab"]);
        assert_eq!(merged("", &["ab"]), Vec::<String>::new());
        assert_eq!(merged("x", &[]), ["x"]);
    }
}
