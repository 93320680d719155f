//! Rows out of a file, one at a time: a JSON array of objects, or one object a line (JSONL).
//!
//! The file is never in memory as a whole. An array is cut into its elements by counting brackets outside of strings, and
//! each element is parsed on its own, so that one broken row does not hide the others; where the cut itself fails (a string
//! that is not closed, brackets too deep, the end of the file) reading stops and the row says so.

use std::io::{self, BufRead, Read};

use super::report::{BadRowCode, Problem};

/// The longest row, in bytes. A longer one is refused without reading on.
pub(super) const MAX_ROW_BYTES: usize = 16 << 20;
/// Brackets that may be open at once within an element of an array.
const MAX_DEPTH: usize = 64;

/// The text of a row, and where it stood.
pub(super) struct RawRow {
    /// The line it begins at, from 1.
    pub(super) line: u64,
    /// Its number, from 1.
    pub(super) row: u64,
    /// Its bytes, or why it could not be cut out.
    pub(super) text: Result<Vec<u8>, Problem>,
}

#[derive(Clone, Copy)]
enum State {
    Start,
    Lines,
    Element { first: bool },
    AfterArray,
    Done,
}

/// Reads the rows of a file of either layout.
pub(super) struct RowReader<R> {
    input: R,
    state: State,
    line: u64,
    row: u64,
    max_row_bytes: usize,
}

impl<R: BufRead> Iterator for RowReader<R> {
    type Item = io::Result<RawRow>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let row = match self.state {
                State::Start => self.find_layout().map(|()| None),
                State::Lines => self.next_line(),
                State::Element { first } => self.next_element(first),
                State::AfterArray => self.text_after_array(),
                State::Done => return None,
            };
            match row {
                Ok(None) => {}
                Ok(Some(row)) => return Some(Ok(row)),
                Err(error) => {
                    self.state = State::Done;
                    return Some(Err(error));
                }
            }
        }
    }
}

impl<R: BufRead> RowReader<R> {
    pub(super) fn new(input: R) -> Self {
        Self::with_limit(input, MAX_ROW_BYTES)
    }

    fn with_limit(input: R, max_row_bytes: usize) -> Self {
        Self { input, state: State::Start, line: 1, row: 0, max_row_bytes }
    }

    /// Skips a byte order mark and white space; a `[` then means an array.
    fn find_layout(&mut self) -> io::Result<()> {
        if self.input.fill_buf()?.starts_with(b"\xEF\xBB\xBF") {
            self.input.consume(3);
        }
        self.state = match self.skip_space()? {
            None => State::Done,
            Some(b'[') => {
                self.input.consume(1);
                State::Element { first: true }
            }
            Some(_) => State::Lines,
        };
        Ok(())
    }

    fn next_line(&mut self) -> io::Result<Option<RawRow>> {
        let limit = self.max_row_bytes as u64 + 1;
        let mut text = Vec::new();
        let read = self.input.by_ref().take(limit).read_until(b'\n', &mut text)? as u64;
        if read == 0 {
            self.state = State::Done;
            return Ok(None);
        }
        let line = self.line;
        self.line += 1;
        if read == limit && text.last() != Some(&b'\n') {
            return Ok(Some(self.stop(line, self.too_long())));
        }
        let text = text.trim_ascii();
        if text.is_empty() {
            return Ok(None);
        }
        self.row += 1;
        Ok(Some(RawRow { line, row: self.row, text: Ok(text.to_vec()) }))
    }

    fn next_element(&mut self, first: bool) -> io::Result<Option<RawRow>> {
        let start = self.skip_space()?;
        if first && start == Some(b']') {
            self.input.consume(1);
            self.state = State::AfterArray;
            return Ok(None);
        }
        let line = self.line;
        match self.cut_element()? {
            Ok((text, end)) => {
                self.state = if end == b']' { State::AfterArray } else { State::Element { first: false } };
                self.row += 1;
                Ok(Some(RawRow { line, row: self.row, text: Ok(text) }))
            }
            Err(problem) => Ok(Some(self.stop(line, problem))),
        }
    }

    /// The bytes up to the comma or bracket that ends an element, and that byte.
    fn cut_element(&mut self) -> io::Result<Result<(Vec<u8>, u8), Problem>> {
        let (mut text, mut depth, mut in_string, mut escaped) = (Vec::new(), 0usize, false, false);
        loop {
            let buffer = self.input.fill_buf()?;
            if buffer.is_empty() {
                return Ok(Err(invalid("the file ends within the array").hint("a closing `]` is missing")));
            }
            let mut end = None;
            for (at, &byte) in buffer.iter().enumerate() {
                self.line += u64::from(byte == b'\n');
                match byte {
                    b'\n' if in_string => {
                        let message = format!("a string is not closed at the end of line {}", self.line - 1);
                        let hint = "a line break within a string is written \\n; the rows after this one were not read";
                        return Ok(Err(invalid(message).hint(hint)));
                    }
                    _ if escaped => escaped = false,
                    b'\\' if in_string => escaped = true,
                    b'"' => in_string = !in_string,
                    _ if in_string => {}
                    b'{' | b'[' => depth += 1,
                    b',' | b']' if depth == 0 => {
                        end = Some(at);
                        break;
                    }
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                if depth > MAX_DEPTH {
                    return Ok(Err(invalid(format!("more than {MAX_DEPTH} brackets are open at once"))));
                }
            }
            let taken = end.unwrap_or(buffer.len());
            text.extend_from_slice(&buffer[..taken]);
            let end = end.map(|at| buffer[at]);
            self.input.consume(taken + usize::from(end.is_some()));
            if text.len() > self.max_row_bytes {
                return Ok(Err(self.too_long()));
            }
            if let Some(end) = end {
                return Ok(Ok((text, end)));
            }
        }
    }

    fn text_after_array(&mut self) -> io::Result<Option<RawRow>> {
        self.state = State::Done;
        let extra = self.skip_space()?.is_some();
        let problem = || invalid("there is text after the end of the array");
        Ok(extra.then(|| self.stop(self.line, problem())))
    }

    /// The next byte that is no white space, without taking it.
    fn skip_space(&mut self) -> io::Result<Option<u8>> {
        loop {
            let buffer = self.input.fill_buf()?;
            let space = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let next = buffer.get(space).copied();
            self.line += buffer[..space].iter().filter(|&&byte| byte == b'\n').count() as u64;
            let at_end = buffer.is_empty();
            self.input.consume(space);
            if next.is_some() || at_end {
                return Ok(next);
            }
        }
    }

    /// A row after which nothing more is read.
    fn stop(&mut self, line: u64, problem: Problem) -> RawRow {
        self.state = State::Done;
        self.row += 1;
        RawRow { line, row: self.row, text: Err(problem) }
    }

    fn too_long(&self) -> Problem {
        let message = format!("the row is longer than {} bytes", self.max_row_bytes);
        Problem::new("", BadRowCode::RowTooLong, message).hint("this row and those after it were not read")
    }
}

fn invalid(message: impl Into<String>) -> Problem {
    Problem::new("", BadRowCode::InvalidJson, message)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    /// (line, row, text or code) of every row.
    fn rows(text: &str, limit: usize) -> Vec<(u64, u64, String)> {
        // A tiny buffer, so that every construct is also seen across its edge.
        let input = io::BufReader::with_capacity(3, text.as_bytes());
        RowReader::with_limit(input, limit)
            .map(|row| row.expect("reading from memory"))
            .map(|row| {
                let text = match row.text {
                    Ok(text) => String::from_utf8(text).expect("UTF-8").trim().to_owned(),
                    Err(problem) => format!("{:?}", problem.code),
                };
                (row.line, row.row, text)
            })
            .collect()
    }

    fn row(line: u64, row: u64, text: &str) -> (u64, u64, String) {
        (line, row, text.to_owned())
    }

    #[test]
    fn lines_survive_marks_blank_lines_and_carriage_returns() {
        let text = "\u{feff}\r\n{\"a\":1}\r\n\r\n   \n{\"b\":\n{\"c\":3}";
        assert_eq!(rows(text, 100), [row(2, 1, "{\"a\":1}"), row(5, 2, "{\"b\":"), row(6, 3, "{\"c\":3}")]);
        assert_eq!(rows("", 100), []);
        assert_eq!(rows(" \n\n", 100), []);
    }

    #[test]
    fn an_array_is_cut_at_its_own_commas_only() {
        let text = "\n[\n {\"a\": \"],[\\\"}\", \"b\": [1, {\"c\": 2}]},\n\n {}\n]\n";
        let first = r#"{"a": "],[\"}", "b": [1, {"c": 2}]}"#;
        assert_eq!(rows(text, 100), [row(3, 1, first), row(5, 2, "{}")]);
        assert_eq!(rows("[]", 100), []);
        assert_eq!(rows("[1,]", 100), [row(1, 1, "1"), row(1, 2, "")]);
    }

    #[test]
    fn reading_stops_where_rows_cannot_be_told_apart() {
        assert_eq!(rows("[{\"a\": 1", 100), [row(1, 1, "InvalidJson")]);
        assert_eq!(rows("[{}\n,{\"a\": \"x\n\"},{}]", 100), [row(1, 1, "{}"), row(2, 2, "InvalidJson")]);
        assert_eq!(rows("[{}] {}", 100), [row(1, 1, "{}"), row(1, 2, "InvalidJson")]);
        assert_eq!(rows(&format!("[{}", "[".repeat(80)), 100), [row(1, 1, "InvalidJson")]);
    }

    /// Counts the bytes that are taken from it.
    struct Counted<R>(R, Rc<Cell<u64>>);

    impl<R: Read> Read for Counted<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(buffer)?;
            self.1.set(self.1.get() + read as u64);
            Ok(read)
        }
    }

    #[test]
    fn a_row_of_two_gigabytes_is_refused_without_being_read() {
        for start in ["", "{\"instruction\": \"", "[{\"instruction\": \"", "[1, \""] {
            let count = Rc::new(Cell::new(0));
            let endless = start.as_bytes().chain(io::repeat(b'x')).take(2 << 30);
            let input = io::BufReader::with_capacity(1 << 16, Counted(endless, Rc::clone(&count)));
            let last = RowReader::new(input).last().expect("a row").expect("reads");
            assert_eq!(last.text.expect_err("refused").code, BadRowCode::RowTooLong, "{start}");
            assert!(count.get() < 17 << 20, "{start}: {} bytes were read", count.get());
        }
    }

    #[test]
    fn a_row_above_the_limit_is_not_read() {
        assert_eq!(rows("{}\n12345678\n{}", 8), [row(1, 1, "{}"), row(2, 2, "12345678"), row(3, 3, "{}")]);
        assert_eq!(rows("{}\n123456789\n{}", 8), [row(1, 1, "{}"), row(2, 2, "RowTooLong")]);
        assert_eq!(rows("[12345678, 123456789, 1]", 8), [row(1, 1, "12345678"), row(1, 2, "RowTooLong")]);
    }
}
