//! Samples CSV: measured requests, one a line, grouped by what they were measured on.
//!
//! Header `model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s` in any order; further columns are
//! ignored; an empty energy or run time is a missing value. Token counts may be means and need not be whole.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::io::Read;

/// One measured request (or the mean of a batch of equal ones).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Number of the line's record, the first after the header being 1.
    pub row: u32,
    /// Input tokens.
    pub tau_in: f64,
    /// Output tokens.
    pub tau_out: f64,
    /// Requests served together.
    pub batch: f64,
    /// Joules per request.
    pub energy: Option<f64>,
    /// Device-seconds per request.
    pub runtime: Option<f64>,
}

/// What samples of one group were measured on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The model's name.
    pub model: String,
    /// The engine.
    pub engine: String,
    /// The execution provider.
    pub provider: String,
    /// The device class.
    pub device: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{},{},{},{}", self.model, self.engine, self.provider, self.device)
    }
}

/// A record whose figures cannot be a measurement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// As in [`Sample::row`].
    pub row: u32,
    /// Which field, its value, and what is wrong with it.
    pub reason: String,
}

/// The samples of one group, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Samples {
    /// With positive and finite figures throughout.
    pub usable: Vec<Sample>,
    /// The others.
    pub rejected: Vec<Rejected>,
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The CSV itself is broken, or not UTF-8 where it must be.
    #[error("not a CSV file: {0}")]
    Csv(#[from] csv::Error),
    /// A required column is missing.
    #[error("the header has no column `{missing}`; it has: {present}")]
    Column {
        /// Its name.
        missing: &'static str,
        /// What there is, separated by commas.
        present: String,
    },
    /// A column stands twice in the header.
    #[error("the header has the column `{0}` twice")]
    Twice(&'static str),
    /// A figure is not a number.
    #[error("line {line} (row {row}): `{field}` is not a number: `{value}`")]
    Number {
        /// Line of the file, the header being 1.
        line: u64,
        /// As in [`Sample::row`].
        row: u32,
        /// Name of the column.
        field: &'static str,
        /// What stands there, cut to 40 characters.
        value: String,
    },
    /// A required figure is empty.
    #[error("line {line} (row {row}): `{field}` is empty; only energy_j and runtime_s may be")]
    Empty {
        /// Line of the file, the header being 1.
        line: u64,
        /// As in [`Sample::row`].
        row: u32,
        /// Name of the column.
        field: &'static str,
    },
    /// No record at all.
    #[error("there is a header but no sample")]
    NoSamples,
    /// More records than row numbers.
    #[error("more than {} samples", u32::MAX)]
    TooMany,
}

/// The largest token count and batch that a sample may have.
pub const LARGEST_TOKENS: f64 = 1e8;
const FIELDS: [&str; 9] =
    ["model", "engine", "provider", "device", "batch", "tau_in", "tau_out", "energy_j", "runtime_s"];

/// Reads samples, grouped by key; `input` is read to its end.
///
/// Figures that are numbers but no measurement (negative, zero, infinite, not a number) reject the record, not the file.
///
/// # Errors
/// Anything that makes it doubtful what the file's columns mean.
pub fn read(input: impl Read) -> Result<BTreeMap<Key, Samples>, ReadError> {
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(input);
    let header = reader.byte_headers()?.clone();
    let places = find_columns(&header)?;
    let mut groups: Vec<(Key, Samples)> = vec![];
    let mut known: HashMap<Vec<u8>, usize> = HashMap::new();
    let (mut record, mut name) = (csv::ByteRecord::new(), Vec::new());
    let mut row: u32 = 0;
    while reader.read_byte_record(&mut record)? {
        row = row.checked_add(1).ok_or(ReadError::TooMany)?;
        name.clear();
        for place in &places[..4] {
            name.extend_from_slice(&record[*place]);
            name.push(0);
        }
        let at = match known.get(&name) {
            Some(at) => *at,
            None => {
                let text = |place: usize| String::from_utf8_lossy(&record[place]).into_owned();
                let [model, engine, provider, device] = [0, 1, 2, 3].map(|i| text(places[i]));
                groups.push((Key { model, engine, provider, device }, Samples::default()));
                known.insert(name.clone(), groups.len() - 1);
                groups.len() - 1
            }
        };
        let line = record.position().map_or(0, csv::Position::line);
        let figures = Figures { record: &record, places: &places, row, line };
        match figures.sample()? {
            Ok(sample) => groups[at].1.usable.push(sample),
            Err(reason) => groups[at].1.rejected.push(Rejected { row, reason }),
        }
    }
    if groups.is_empty() {
        return Err(ReadError::NoSamples);
    }
    // Names that were not UTF-8 may have become equal.
    let mut merged: BTreeMap<Key, Samples> = BTreeMap::new();
    for (key, samples) in groups {
        let into = merged.entry(key).or_default();
        into.usable.extend(samples.usable);
        into.rejected.extend(samples.rejected);
    }
    Ok(merged)
}

fn find_columns(header: &csv::ByteRecord) -> Result<[usize; 9], ReadError> {
    let mut places = [0; 9];
    for (place, field) in places.iter_mut().zip(FIELDS) {
        // Spreadsheets put a byte-order mark before the first name.
        let is = |name: &[u8]| name.strip_prefix(b"\xef\xbb\xbf").unwrap_or(name) == field.as_bytes();
        let mut found = (0..header.len()).filter(|&i| is(&header[i]));
        *place = found.next().ok_or_else(|| ReadError::Column {
            missing: field,
            present: header.iter().map(String::from_utf8_lossy).collect::<Vec<_>>().join(","),
        })?;
        if found.next().is_some() {
            return Err(ReadError::Twice(field));
        }
    }
    Ok(places)
}

struct Figures<'a> {
    record: &'a csv::ByteRecord,
    places: &'a [usize; 9],
    row: u32,
    line: u64,
}

impl Figures<'_> {
    /// The sample, or why its figures cannot be one.
    fn sample(&self) -> Result<Result<Sample, String>, ReadError> {
        let required = |at: usize| {
            let empty = || ReadError::Empty { line: self.line, row: self.row, field: FIELDS[at] };
            self.number(at)?.ok_or_else(empty)
        };
        let (batch, tau_in, tau_out) = (required(4)?, required(5)?, required(6)?);
        let (energy, runtime) = (self.number(7)?, self.number(8)?);
        Ok(self.check(Sample { row: self.row, tau_in, tau_out, batch, energy, runtime }))
    }

    fn number(&self, at: usize) -> Result<Option<f64>, ReadError> {
        let bytes = &self.record[self.places[at]];
        if bytes.is_empty() {
            return Ok(None);
        }
        let parsed = std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok());
        parsed.map(Some).ok_or_else(|| ReadError::Number {
            line: self.line,
            row: self.row,
            field: FIELDS[at],
            value: String::from_utf8_lossy(bytes).chars().take(40).collect(),
        })
    }

    fn check(&self, sample: Sample) -> Result<Sample, String> {
        let Sample { row: _, tau_in, tau_out, batch, energy, runtime } = sample;
        let wrong = |at: usize, value: f64, must: &str| Err(format!("{} is {value}: it must be {must}", FIELDS[at]));
        if !(1.0..=LARGEST_TOKENS).contains(&batch) {
            return wrong(4, batch, "from 1 to 100 million");
        }
        for (at, tokens) in [(5, tau_in), (6, tau_out)] {
            if !(0.0..=LARGEST_TOKENS).contains(&tokens) {
                return wrong(at, tokens, "from 0 to 100 million");
            }
        }
        if tau_in + tau_out == 0.0 {
            return Err("tau_in and tau_out are both 0: a request has tokens".to_owned());
        }
        // Within these bounds squares and their sums stay finite.
        for (at, value) in [(7, energy), (8, runtime)] {
            if let Some(value) = value.filter(|v| !(1e-12..=1e15).contains(v)) {
                return wrong(at, value, "positive, from 1e-12 to 1e15 (leave it empty where there is no reading)");
            }
        }
        if energy.is_none() && runtime.is_none() {
            return Err("energy_j and runtime_s are both empty: nothing was measured".to_owned());
        }
        Ok(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADER: &str = "model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s\n";

    fn read_rows(rows: &str) -> Result<BTreeMap<Key, Samples>, ReadError> {
        read(format!("{HEADER}{rows}").as_bytes())
    }

    #[test]
    fn columns_come_in_any_order_and_further_ones_are_ignored() {
        let text = "note,tau_out,tau_in,batch,device,provider,engine,model,runtime_s,energy_j\n\
                    \"a, b\",16,8,1,d,p,e,\"m, 7B\",0.5,\nx,32,8,1,d,p,e,\"m, 7B\",,9.5\n";
        let groups = read(text.as_bytes()).unwrap();
        let (key, samples) = groups.first_key_value().unwrap();
        assert_eq!(key.model, "m, 7B");
        let expected = Sample { row: 1, tau_in: 8.0, tau_out: 16.0, batch: 1.0, energy: None, runtime: Some(0.5) };
        assert_eq!(samples.usable[0], expected);
        assert_eq!((samples.usable[1].energy, samples.usable[1].runtime), (Some(9.5), None));
    }

    #[test]
    fn impossible_figures_reject_their_row_alone() {
        let groups = read_rows(
            "m,e,p,d,1,8,8,NaN,1\nm,e,p,d,1,8,8,-3,1\nm,e,p,d,1,8,8,0,1\nm,e,p,d,1,8,8,5,inf\nm,e,p,d,0,8,8,5,1\n\
             m,e,p,d,1,0,0,5,1\nm,e,p,d,1,8,8,,\nm,e,p,d,1,-1,8,5,1\nm,e,p,d,1,8,8,5,1\n",
        )
        .unwrap();
        let samples = groups.values().next().unwrap();
        assert_eq!(samples.usable.iter().map(|s| s.row).collect::<Vec<_>>(), [9]);
        assert_eq!(samples.rejected.iter().map(|r| r.row).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(samples.rejected[1].reason.contains("energy_j is -3"), "{}", samples.rejected[1].reason);
    }

    #[test]
    fn a_file_whose_columns_are_in_doubt_is_refused_with_the_place() {
        let text = |error: Result<_, ReadError>| error.unwrap_err().to_string();
        assert!(text(read("model,engine\n".as_bytes())).contains("no column `provider`"));
        assert!(text(read(format!("model,{HEADER}").as_bytes())).contains("twice"));
        assert_eq!(
            text(read_rows("m,e,p,d,1,8,8,5,1\nm,e,p,d,1,8,eight,5,1\n")),
            "line 3 (row 2): `tau_out` is not a number: `eight`"
        );
        assert!(text(read_rows("m,e,p,d,1,,8,5,1\n")).contains("`tau_in` is empty"));
        assert!(text(read_rows("m,e,p,d,1,8\n")).contains("not a CSV file"));
        assert!(matches!(read_rows(""), Err(ReadError::NoSamples)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&bytes[..]);
            let with_header = [HEADER.as_bytes(), &bytes].concat();
            let _ = read(&with_header[..]);
        }

        #[test]
        fn fields_of_any_kind_are_read_or_refused(
            fields in prop::collection::vec(
                prop::sample::select(vec!["", "1", "-0", "8", "1e400", "-1e-400", "NaN", "inf", "\"", "\"a\"\"b\"", "x", ",", "\r", "é", "\0", "0x1"]),
                0..60,
            )
        ) {
            let rows: Vec<String> = fields.chunks(9).map(|row| row.join(",")).collect();
            if let Ok(groups) = read_rows(&rows.join("\n")) {
                for sample in groups.values().flat_map(|g| &g.usable) {
                    prop_assert!(sample.energy.unwrap_or(1.0) > 0.0 && sample.runtime.unwrap_or(1.0) > 0.0);
                    prop_assert!(sample.tau_in + sample.tau_out > 0.0 && sample.batch >= 1.0);
                }
            }
        }
    }
}
