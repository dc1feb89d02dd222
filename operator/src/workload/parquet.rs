//! Workloads as Parquet: the columns `tau_in` and `tau_out`, of any type of number, a page of each at a time.
//!
//! What a file says of itself is not believed before room is made for it: it may be cut off, damaged or made up.

use super::out_of_range;
use anyhow::{Context, Result, bail, ensure};
use joulecast_planner::plan::{REQUESTS_LIMIT, TOKENS_LIMIT};
use joulecast_planner::units::Tokens;
use parquet::basic::{Compression, ConvertedType, Encoding, LogicalType, Type};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{DataType, DoubleType, FloatType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaDataReader, RowGroupMetaData};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::{ColumnDescPtr, SchemaDescriptor};
use std::fs::File;
use std::sync::Arc;

/// The first and the last four bytes of a Parquet file, and of one whose metadata are encrypted.
pub(super) const MAGIC: &[u8] = b"PAR1";
pub(super) const MAGIC_ENCRYPTED: &[u8] = b"PARE";

const NAMES: [&str; 2] = ["tau_in", "tau_out"];
/// Rows decoded at a time.
const ROWS: usize = 1 << 16;
/// Columns named where one is missing.
const NAMED: usize = 20;

/// Reads all requests of a Parquet file, in its order.
pub(super) fn read(file: File) -> Result<Vec<Tokens>> {
    let length = file.metadata().context("cannot tell its size")?.len();
    let metadata = ParquetMetaDataReader::new()
        .parse_and_finish(&file)
        .context("the Parquet metadata at its end cannot be read: is the file whole?")?;
    let schema = metadata.file_metadata().schema_descr();
    let places = [find(schema, NAMES[0])?, find(schema, NAMES[1])?];
    let source = Source { file: Arc::new(file), length };
    let mut requests = vec![];
    for (number, group) in metadata.row_groups().iter().enumerate() {
        source
            .read_group(group, schema, places, &mut requests)
            .with_context(|| format!("row group {number} (the first is 0)"))?;
    }
    Ok(requests)
}

/// The place of the column among the primitive ones.
fn find(schema: &SchemaDescriptor, name: &str) -> Result<usize> {
    let mut places = (0..schema.num_columns())
        .filter(|&place| schema.column(place).path().parts().first().is_some_and(|first| first == name));
    let Some(place) = places.next() else {
        let fields = schema.root_schema().get_fields();
        let present = fields.iter().take(NAMED).map(|field| field.name().chars().take(40).collect::<String>());
        let more = if fields.len() > NAMED { " and others" } else { "" };
        bail!("it lacks the column {name}; it has: {}{more}", present.collect::<Vec<_>>().join(", "));
    };
    let column = schema.column(place);
    ensure!(
        column.path().parts().len() == 1 && column.max_rep_level() == 0,
        "the column {name} is nested ({}); it must hold one number a row",
        column.path().string()
    );
    ensure!(places.next().is_none(), "it has the column {name} twice");
    Ok(place)
}

/// How the integers of a column are meant.
#[derive(Clone, Copy, PartialEq)]
enum Sign {
    Signed,
    Unsigned,
}

/// That a column holds plain numbers, and of which sign.
fn sign(column: &ColumnDescPtr) -> Result<Sign> {
    let name = column.name();
    let refused = |what: String| {
        format!("the column {name} holds {what}; it must hold integers (or whole floating point numbers): convert it")
    };
    match column.logical_type_ref() {
        Some(LogicalType::Integer(kind)) => return Ok(if kind.is_signed { Sign::Signed } else { Sign::Unsigned }),
        Some(other) => bail!(refused(format!("{other:?}"))),
        None => {}
    }
    match column.converted_type() {
        ConvertedType::NONE
        | ConvertedType::INT_8
        | ConvertedType::INT_16
        | ConvertedType::INT_32
        | ConvertedType::INT_64 => {}
        ConvertedType::UINT_8 | ConvertedType::UINT_16 | ConvertedType::UINT_32 | ConvertedType::UINT_64 => {
            return Ok(Sign::Unsigned);
        }
        other => bail!(refused(other.to_string())),
    }
    match column.physical_type() {
        Type::INT32 | Type::INT64 | Type::FLOAT | Type::DOUBLE => Ok(Sign::Signed),
        other => bail!(refused(other.to_string())),
    }
}

struct Source {
    file: Arc<File>,
    length: u64,
}

impl Source {
    fn read_group(
        &self,
        group: &RowGroupMetaData,
        schema: &SchemaDescriptor,
        places: [usize; 2],
        requests: &mut Vec<Tokens>,
    ) -> Result<()> {
        let rows = usize::try_from(group.num_rows())
            .with_context(|| format!("its metadata tell {} rows: the file is damaged", group.num_rows()))?;
        let column = |at: usize| {
            let chunk = group.columns().get(places[at]).context("its metadata lack a column: the file is damaged")?;
            self.column(NAMES[at], chunk, &schema.column(places[at]), rows)
        };
        let mut columns = [column(0)?, column(1)?];
        let mut counts = [vec![], vec![]];
        let mut done = 0;
        while done < rows {
            let most = ROWS.min(rows - done);
            ensure!(requests.len() + most <= REQUESTS_LIMIT, "more than {REQUESTS_LIMIT} requests; split the job");
            for ((column, counts), name) in columns.iter_mut().zip(&mut counts).zip(NAMES) {
                column.next(most, requests.len(), counts)?;
                let got = done + counts.len();
                ensure!(counts.len() == most, "the column {name} ends after {got} of {rows} rows: the file is damaged");
            }
            requests.extend(counts[0].iter().zip(&counts[1]).map(|(&input, &output)| Tokens { input, output }));
            done += most;
        }
        Ok(())
    }

    fn column(
        &self,
        name: &'static str,
        chunk: &ColumnChunkMetaData,
        column: &ColumnDescPtr,
        rows: usize,
    ) -> Result<Box<dyn Counts>> {
        let unsigned = sign(column)? == Sign::Unsigned;
        match chunk.compression() {
            Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_) => {}
            other => bail!(
                "the column {name} is compressed by {}; what is read is snappy, zstd and uncompressed: write the file anew",
                other.to_string().split('(').next().unwrap_or_default()
            ),
        }
        ensure!(
            chunk.file_path().is_none(),
            "the column {name} lies in another file: write one file with both columns"
        );
        let start = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
        let end = u64::try_from(start).ok().zip(u64::try_from(chunk.compressed_size()).ok());
        let end = end.and_then(|(start, length)| start.checked_add(length));
        ensure!(
            end.is_some_and(|end| end <= self.length) && usize::try_from(chunk.num_values()) == Ok(rows),
            "the column {name} is said to have {} values for {rows} rows, in {} bytes from {start} of the file's {}: the \
             file is damaged",
            chunk.num_values(),
            chunk.compressed_size(),
            self.length
        );
        let pages = SerializedPageReader::new(Arc::clone(&self.file), chunk, rows, None)?;
        let width = if matches!(column.physical_type(), Type::INT32 | Type::FLOAT) { 4 } else { 8 };
        let pages = Box::new(Checked { pages, width, dictionary: false });
        let at = Place { name, nullable: column.max_def_level() > 0 };
        Ok(match (column.physical_type(), unsigned) {
            (Type::INT32, false) => numbers::<Int32Type>(at, column, pages, |v| u32::try_from(*v).ok(), i32::to_string),
            (Type::INT32, true) => {
                numbers::<Int32Type>(at, column, pages, |v| Some(v.cast_unsigned()), |v| v.cast_unsigned().to_string())
            }
            (Type::INT64, false) => numbers::<Int64Type>(at, column, pages, |v| u32::try_from(*v).ok(), i64::to_string),
            (Type::INT64, true) => numbers::<Int64Type>(
                at,
                column,
                pages,
                |v| u32::try_from(v.cast_unsigned()).ok(),
                |v| v.cast_unsigned().to_string(),
            ),
            (Type::FLOAT, _) => {
                numbers::<FloatType>(at, column, pages, |v| super::whole(f64::from(*v)), f32::to_string)
            }
            (Type::DOUBLE, _) => numbers::<DoubleType>(at, column, pages, |v| super::whole(*v), f64::to_string),
            (other, _) => bail!("the column {name} holds {other} under the name of integers: the file is damaged"),
        })
    }
}

/// Token counts from one column of a row group.
trait Counts {
    /// The next so many, or as many as there are; `before` rows of the file were read already.
    fn next(&mut self, most: usize, before: usize, counts: &mut Vec<u32>) -> Result<()>;
}

#[derive(Clone, Copy)]
struct Place {
    name: &'static str,
    nullable: bool,
}

struct Numbers<T: DataType> {
    at: Place,
    reader: ColumnReaderImpl<T>,
    values: Vec<T::T>,
    /// 0 where a value is null.
    levels: Vec<i16>,
    count: fn(&T::T) -> Option<u32>,
    shown: fn(&T::T) -> String,
}

fn numbers<T: DataType>(
    at: Place,
    column: &ColumnDescPtr,
    pages: Box<dyn PageReader>,
    count: fn(&T::T) -> Option<u32>,
    shown: fn(&T::T) -> String,
) -> Box<dyn Counts> {
    let reader = ColumnReaderImpl::<T>::new(Arc::clone(column), pages);
    Box::new(Numbers::<T> { at, reader, values: vec![], levels: vec![], count, shown })
}

impl<T: DataType> Counts for Numbers<T> {
    fn next(&mut self, most: usize, before: usize, counts: &mut Vec<u32>) -> Result<()> {
        let Place { name, nullable } = self.at;
        self.values.clear();
        self.levels.clear();
        counts.clear();
        let levels = nullable.then_some(&mut self.levels);
        let (rows, ..) = self.reader.read_records(most, levels, None, &mut self.values).with_context(|| {
            format!("the column {name} cannot be read after row {before}: the file is damaged or not whole")
        })?;
        // Values stand without the nulls between them.
        let null = self.levels.iter().position(|level| *level == 0);
        for (i, value) in self.values.iter().enumerate().take(null.unwrap_or(rows)) {
            let count = (self.count)(value).filter(|count| *count < TOKENS_LIMIT);
            counts.push(count.with_context(|| out_of_range("row", before + i + 1, name, &(self.shown)(value)))?);
        }
        match null {
            Some(i) => bail!(
                "row {}: {name} is null; a request has both token counts: fill in or leave out such rows",
                before + i + 1
            ),
            None => Ok(()),
        }
    }
}

/// Pages that the decoder takes as given: it makes room for all values that a dictionary claims to have, and panics where
/// a page needs a dictionary that never came.
struct Checked {
    pages: SerializedPageReader<File>,
    /// Bytes of a value.
    width: usize,
    /// Whether there was a dictionary.
    dictionary: bool,
}

impl PageReader for Checked {
    fn get_next_page(&mut self) -> Result<Option<Page>, ParquetError> {
        let page = self.pages.get_next_page()?;
        let bad = match &page {
            Some(Page::DictionaryPage { buf, num_values, .. }) => {
                self.dictionary = true;
                (*num_values as usize > buf.len() / self.width)
                    .then(|| format!("a dictionary of {num_values} values in {} bytes", buf.len()))
            }
            Some(Page::DataPage { encoding, .. } | Page::DataPageV2 { encoding, .. }) => {
                let needs = matches!(encoding, Encoding::PLAIN_DICTIONARY | Encoding::RLE_DICTIONARY);
                (needs && !self.dictionary).then(|| "a page of a dictionary that is not there".to_owned())
            }
            None => None,
        };
        bad.map_or(Ok(page), |bad| Err(ParquetError::General(bad)))
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>, ParquetError> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<(), ParquetError> {
        self.pages.skip_next_page()
    }
}

impl Iterator for Checked {
    type Item = Result<Page, ParquetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

#[cfg(test)]
mod tests;
