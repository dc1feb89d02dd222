//! What writers may write is read as the CSV is; what is no workload, damaged or made up is refused.

use super::*;
use crate::cli::plan::PlanCommand;
use clap::{Args, FromArgMatches};
use parquet::basic::ZstdLevel;
use parquet::data_type::ByteArrayType;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use std::io::Write;
use std::path::Path;

/// How a file is written.
#[derive(Debug, Clone)]
struct Manner {
    /// Of `tau_in` and of `tau_out`.
    kinds: [Kind; 2],
    optional: bool,
    dictionary: bool,
    compression: Compression,
    version: WriterVersion,
    rows_in_group: usize,
    rows_in_page: usize,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            kinds: [Kind::Int64; 2],
            optional: false,
            dictionary: true,
            compression: Compression::SNAPPY,
            version: WriterVersion::PARQUET_1_0,
            rows_in_group: 1000,
            rows_in_page: 100,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Int32,
    Uint32,
    Uint8,
    Int64,
    Uint64,
    Float,
    Double,
    Text,
    Timestamp,
    Bool,
    List,
}

impl Kind {
    fn declared(self, name: &str, repetition: &str) -> String {
        let (kind, meant) = match self {
            Self::Int32 => ("int32", ""),
            Self::Uint32 => ("int32", "(INTEGER(32,false))"),
            Self::Uint8 => ("int32", "(UINT_8)"),
            Self::Int64 => ("int64", ""),
            Self::Uint64 => ("int64", "(INTEGER(64,false))"),
            Self::Float => ("float", ""),
            Self::Double => ("double", ""),
            Self::Text => ("byte_array", "(STRING)"),
            Self::Timestamp => ("int64", "(TIMESTAMP(MILLIS,true))"),
            Self::Bool => ("boolean", ""),
            Self::List => return format!("repeated int64 {name};"),
        };
        format!("{repetition} {kind} {name} {meant};")
    }

    /// Writes values; those that are not a number are null where the column is optional.
    fn write(self, column: &mut SerializedColumnWriter<'_>, values: &[f64], optional: bool) {
        let levels: Vec<i16> = values.iter().map(|v| i16::from(!(optional && v.is_nan()))).collect();
        let values: Vec<f64> = values.iter().copied().filter(|v| !(optional && v.is_nan())).collect();
        let levels = optional.then_some(&levels[..]);
        let int64: Vec<i64> = values.iter().map(|v| *v as i64).collect();
        let int32: Vec<i32> = int64.iter().map(|v| *v as i32).collect();
        match self {
            Self::Int32 | Self::Uint32 | Self::Uint8 => {
                column.typed::<Int32Type>().write_batch(&int32, levels, None).map(drop)
            }
            Self::Int64 | Self::Uint64 | Self::Timestamp => {
                column.typed::<Int64Type>().write_batch(&int64, levels, None).map(drop)
            }
            Self::Float => {
                let float: Vec<f32> = values.iter().map(|v| *v as f32).collect();
                column.typed::<FloatType>().write_batch(&float, levels, None).map(drop)
            }
            Self::Double => column.typed::<DoubleType>().write_batch(&values, levels, None).map(drop),
            Self::Text => {
                let text: Vec<_> = values.iter().map(|v| v.to_string().as_str().into()).collect();
                column.typed::<ByteArrayType>().write_batch(&text, levels, None).map(drop)
            }
            Self::Bool => {
                let bools: Vec<bool> = values.iter().map(|v| *v > 0.0).collect();
                column.typed::<parquet::data_type::BoolType>().write_batch(&bools, levels, None).map(drop)
            }
            Self::List => {
                let (one, none) = (vec![1; int64.len()], vec![0; int64.len()]);
                column.typed::<Int64Type>().write_batch(&int64, Some(&one), Some(&none)).map(drop)
            }
        }
        .unwrap();
    }
}

fn written(rows: &[(f64, f64)], manner: &Manner) -> Vec<u8> {
    let repetition = if manner.optional { "optional" } else { "required" };
    // Among others, and the other way round.
    let schema = format!(
        "message rows {{ required int32 id; {} {} }}",
        manner.kinds[1].declared("tau_out", repetition),
        manner.kinds[0].declared("tau_in", repetition)
    );
    write_columns(&schema, rows, manner)
}

fn write_columns(schema: &str, rows: &[(f64, f64)], manner: &Manner) -> Vec<u8> {
    let properties = WriterProperties::builder()
        .set_compression(manner.compression)
        .set_writer_version(manner.version)
        .set_dictionary_enabled(manner.dictionary)
        .set_statistics_enabled(EnabledStatistics::Page)
        .set_data_page_row_count_limit(manner.rows_in_page)
        .set_write_batch_size(manner.rows_in_page)
        .build();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(vec![], Arc::clone(&schema), Arc::new(properties)).unwrap();
    for rows in rows.chunks(manner.rows_in_group) {
        let mut group = writer.next_row_group().unwrap();
        for field in schema.get_fields() {
            let mut column = group.next_column().unwrap().unwrap();
            match field.name() {
                "tau_in" => {
                    let values: Vec<f64> = rows.iter().map(|row| row.0).collect();
                    manner.kinds[0].write(&mut column, &values, manner.optional);
                }
                "tau_out" => {
                    let values: Vec<f64> = rows.iter().map(|row| row.1).collect();
                    manner.kinds[1].write(&mut column, &values, manner.optional);
                }
                _ => Kind::Int32.write(&mut column, &vec![7.0; rows.len()], false),
            }
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

/// The file's name is kept: the message has it.
fn read_bytes(bytes: &[u8]) -> Result<Vec<Tokens>> {
    let mut file = tempfile::Builder::new().prefix("requests").suffix(".parquet").tempfile().unwrap();
    file.write_all(bytes).unwrap();
    super::super::read(file.path())
}

fn csv(rows: &[(f64, f64)]) -> String {
    rows.iter().fold("tau_in,tau_out\n".to_owned(), |text, (x, y)| text + &format!("{x},{y}\n"))
}

fn manners() -> impl Strategy<Value = Manner> {
    use Kind::{Double, Float, Int32, Int64, Uint32, Uint64};
    let kind = || prop::sample::select(vec![Int32, Uint32, Int64, Uint64, Float, Double]);
    let compression = prop::sample::select(vec![
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::ZSTD(ZstdLevel::default()),
    ]);
    let version = prop::sample::select(vec![WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0]);
    ([kind(), kind()], any::<[bool; 2]>(), compression, version, 1..400_usize, 1..100_usize).prop_map(
        |(kinds, [optional, dictionary], compression, version, rows_in_group, rows_in_page)| Manner {
            kinds,
            optional,
            dictionary,
            compression,
            version,
            rows_in_group,
            rows_in_page,
        },
    )
}

proptest! {
    #[test]
    fn parquet_and_csv_of_the_same_requests_are_read_alike(
        rows in prop::collection::vec((0..TOKENS_LIMIT, 0..9000u32), 0..600),
        manner in manners(),
    ) {
        let rows: Vec<(f64, f64)> = rows.iter().map(|(x, y)| (f64::from(*x), f64::from(*y))).collect();
        let of_csv = super::super::parse(csv(&rows).as_bytes()).unwrap();
        prop_assert_eq!(read_bytes(&written(&rows, &manner)).unwrap(), of_csv);
    }

    #[test]
    fn a_damaged_file_is_read_or_refused(
        manner in manners(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let rows: Vec<(f64, f64)> = (0..300).map(|i| (f64::from(i % 40), f64::from(7 * i))).collect();
        let mut bytes = written(&rows, &manner);
        for (place, byte) in damage {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Err(error) = read_bytes(&bytes) {
            prop_assert!(format!("{error:#}").contains("requests"), "{:#}", error);
        }
    }
}

#[test]
fn no_bit_of_a_small_file_does_harm_when_it_is_turned() {
    let rows = [(3.0, 4.0), (5.0, 6.0), (5.0, 6.0)];
    let manner = Manner { optional: true, compression: Compression::UNCOMPRESSED, ..Manner::default() };
    let bytes = written(&rows, &manner);
    let mut refused = 0;
    for place in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[place] ^= 1 << bit;
            refused += usize::from(read_bytes(&damaged).is_err());
        }
        assert!(read_bytes(&bytes[..place]).is_err(), "{place}");
    }
    assert!(refused > bytes.len(), "{refused} of {}", 8 * bytes.len());
}

#[test]
fn many_rows_come_in_their_order() {
    let rows: Vec<(f64, f64)> = (0..3 * ROWS as u32 + 17).map(|i| (f64::from(i % 9973), f64::from(i))).collect();
    let manner = Manner { rows_in_group: 2 * ROWS + 5, rows_in_page: 20_000, ..Manner::default() };
    let read = read_bytes(&written(&rows, &manner)).unwrap();
    assert!(read.iter().map(|t| (f64::from(t.input), f64::from(t.output))).eq(rows));
}

#[test]
fn errors_name_file_row_column_and_value() {
    let error = |rows: &[(f64, f64)], manner: &Manner| {
        let error = format!("{:#}", read_bytes(&written(rows, manner)).unwrap_err());
        assert!(error.contains("in the workload /") && error.contains("requests"), "{error}");
        error
    };
    let of = |kinds| Manner { kinds, rows_in_group: 2, ..Manner::default() };
    use Kind::*;
    let rows = [(1.0, 2.0), (3.0, 4.0), (5.0, -6.0)];
    assert!(error(&rows, &of([Int32, Int32])).contains("row 3: tau_out is -6; it must be a whole number from 0"));
    let rows = [(1.0, 2.0), (-3.0, 4.0)];
    assert!(error(&rows, &of([Uint32, Int64])).contains("row 2: tau_in is 4294967293"));
    assert!(error(&rows, &of([Uint64, Int64])).contains("row 2: tau_in is 18446744073709551613"));
    let rows = [(1.5, 2.0), (f64::NAN, 4.0)];
    assert!(error(&rows, &of([Float, Double])).contains("row 1: tau_in is 1.5"));
    assert!(error(&rows[1..], &of([Double, Double])).contains("row 1: tau_in is NaN"));
    let missing = Manner { optional: true, ..of([Int64, Int64]) };
    assert!(error(&[(1.0, 2.0), (3.0, f64::NAN)], &missing).contains("row 2: tau_out is null"));
    let rows = [(1.0, 2.0)];
    assert!(error(&[(99_999_999.0, 1.0)], &of([Int32, Int32])).contains("row 1: tau_in is 99999999"));
    assert!(error(&rows, &of([Text, Int64])).contains("the column tau_in holds String"));
    assert!(error(&rows, &of([Int64, Bool])).contains("the column tau_out holds BOOLEAN"));
    assert!(error(&rows, &of([Int64, Timestamp])).contains("the column tau_out holds Timestamp"));
    assert!(error(&rows, &of([Int64, List])).contains("the column tau_out is nested"));
}

#[test]
fn files_without_the_columns_or_of_another_kind_are_refused() {
    let manner = Manner::default();
    let error = |bytes: &[u8]| format!("{:#}", read_bytes(bytes).unwrap_err());
    let lacking = "message rows { required int32 tokens; required int64 tau_in; }";
    let lacking = write_columns(lacking, &[(1.0, 2.0)], &manner);
    assert!(error(&lacking).contains("lacks the column tau_out; it has: tokens, tau_in"));
    let nested = "message rows { required int64 tau_in; required group tau_out { required int64 count; } }";
    assert!(error(&write_columns(nested, &[(1.0, 2.0)], &manner)).contains("tau_out is nested (tau_out.count)"));
    let twice = "message rows { required int64 tau_in; required int64 tau_out; required int64 tau_in; }";
    assert!(error(&write_columns(twice, &[(1.0, 2.0)], &manner)).contains("column tau_in twice"));
    assert!(error(b"tau_in,tau_out\n1,2\n").contains("does not begin with PAR1"));
    assert!(error(b"").contains("does not begin with PAR1"));
    assert!(error(b"PAR1").contains("is the file whole?"));
    assert!(error(b"PARE and then nothing of the kind PARE").contains("encrypt"));
    assert_eq!(read_bytes(&written(&[], &manner)).unwrap(), []);
    let small = Manner { kinds: [Kind::Uint8; 2], ..manner };
    assert_eq!(read_bytes(&written(&[(1.0, 255.0)], &small)).unwrap(), [Tokens { input: 1, output: 255 }]);
}

#[test]
fn a_plan_is_the_same_from_either() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let rows: Vec<(f64, f64)> = (0..5000).map(|i| (f64::from(i * 37 % 901), f64::from(i * i % 211))).collect();
    std::fs::write(place("w.csv"), csv(&rows)).unwrap();
    std::fs::write(place("w.parquet"), written(&rows, &Manner { optional: true, ..Manner::default() })).unwrap();
    let configs = r#"{"configs": [
        {"name": "a", "accuracy": 0.5, "energy": {"tout": 1.0}, "runtime": {"tout": 0.01}, "share": {"max": 0.7}},
        {"name": "b", "accuracy": 0.7, "energy": {"const": 9, "tout": 2.0, "tin": 0.1}, "runtime": {"tout": 0.02}}]}"#;
    std::fs::write(place("c.json"), configs).unwrap();
    let plan = |workload: &str| {
        let (workload, names) = (place(workload), place(&format!("{workload}.names")));
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let arguments = [
            "plan".to_owned(),
            "--workload".to_owned(),
            text(&workload),
            "--configs".to_owned(),
            text(&place("c.json")),
            "--zeta".to_owned(),
            "0.6".to_owned(),
            "--assignments".to_owned(),
            text(&names),
            "--output".to_owned(),
            "json".to_owned(),
        ];
        let matches = PlanCommand::augment_args(clap::Command::new("plan")).get_matches_from(arguments);
        let mut out = vec![];
        assert_eq!(PlanCommand::from_arg_matches(&matches).unwrap().run(&mut out).unwrap(), 0);
        let mut report: serde_json::Value = serde_json::from_slice(&out).unwrap();
        for time in ["solve_seconds", "solve_cpu_seconds"] {
            assert!(report.as_object_mut().unwrap().remove(time).is_some());
        }
        (report, std::fs::read_to_string(names).unwrap())
    };
    let (of_csv, of_parquet) = (plan("w.csv"), plan("w.parquet"));
    assert_eq!(of_csv.1.lines().count(), rows.len());
    assert_eq!(of_csv, of_parquet);
}
