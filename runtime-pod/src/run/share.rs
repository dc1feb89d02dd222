//! Which lines of the input are a run's own: a block of those that the plan assigned to its configuration.

use super::RunFailure;
use crate::assignment::{AssignmentError, FINISHED, Reader};
use crate::batch_file::results::Results;
use crate::batch_file::{Lines, MAX_LINE_BYTES, lines};
use joulecast_crds::run_spec::{Assignment, Rest};
use std::fs::File;
use std::io::{self, BufReader, Seek};
use std::path::PathBuf;

/// Buffer of the input, in bytes.
pub const READ_BYTES: usize = 1 << 17;

/// Which lines are a run's own, as its specification says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Division {
    /// Blocks; at least 1.
    pub shards: u32,
    /// The run's own block, less than `shards`.
    pub shard: u32,
    /// The block of an earlier division that the blocks are pieces of.
    pub rest: Option<Rest>,
    /// The plan's assignment of lines to configurations.
    pub assignment: Option<Assignment>,
    /// The run's own configuration.
    pub configuration: u32,
}

impl Division {
    /// All lines are the run's own.
    #[must_use]
    pub fn whole() -> Self {
        Self { shards: 1, shard: 0, rest: None, assignment: None, configuration: 0 }
    }

    /// Whether all lines are the run's own.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.shards == 1 && self.rest.is_none() && self.assignment.is_none()
    }

    /// The lines of an input of `total` request lines, as they come.
    ///
    /// # Errors
    /// When the assignment cannot be used.
    pub fn share(&self, total: u64) -> Result<Share, AssignmentError> {
        let Self { shards, shard, rest, assignment, configuration } = self;
        let (reader, lines) = match assignment {
            Some(assignment) if assignment.requests != total => {
                let problem = format!("covers {} requests; the input has {total}", assignment.requests);
                return Err(AssignmentError::Other { path: PathBuf::from(&assignment.path), problem });
            }
            Some(assignment) => {
                let (reader, own) = Reader::open(assignment, *configuration)?;
                (Some(reader), own)
            }
            None => (None, total),
        };
        let (first, end) = match rest {
            None => (border(lines, *shard, *shards), border(lines, shard + 1, *shards)),
            Some(Rest { shards: of, shard: block, from }) => {
                let (begin, end) = (border(lines, *block, *of), border(lines, block + 1, *of));
                let from = begin.saturating_add(*from).min(end);
                // What came before is the first one's, should it lack a result after all.
                let first = if *shard == 0 { begin } else { from + border(end - from, *shard, *shards) };
                (first, from + border(end - from, shard + 1, *shards))
            }
        };
        let finished = reader.as_ref().is_some_and(Reader::has_finished);
        let spare = finished && *shard == 0 && (*configuration == 0 || rest.is_some());
        Ok(Share { reader, configuration: *configuration, first, end, rank: 0, spare })
    }
}

/// Where the block of this number begins, of so many equal ones.
fn border(lines: u64, block: u32, of: u32) -> u64 {
    // At most `lines`, which is a u64.
    u64::try_from(u128::from(lines) * u128::from(block) / u128::from(of)).unwrap_or(u64::MAX)
}

/// A run's own lines, asked for one after the other.
pub struct Share {
    reader: Option<Reader>,
    configuration: u32,
    first: u64,
    end: u64,
    /// Lines of the configuration so far.
    rank: u64,
    /// Whether lines that had a result when the plan was made are the run's own, should they lack it after all.
    spare: bool,
}

/// Whether a line is a run's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owned {
    /// Another's.
    No,
    /// Its own.
    Yes,
    /// Its own if it has no result: it had one when the plan was made, and counts among nobody's lines.
    IfMissing,
}

impl Share {
    /// All lines, however many there are.
    #[must_use]
    pub fn all() -> Self {
        Self { reader: None, configuration: 0, first: 0, end: u64::MAX, rank: 0, spare: false }
    }

    /// Whether the next request line is the run's own; to be asked once for each line, in order.
    ///
    /// # Errors
    /// When the assignment cannot be read.
    pub fn owns_next(&mut self) -> Result<Owned, AssignmentError> {
        if let Some(reader) = &mut self.reader {
            match reader.next_configuration()? {
                Some(FINISHED) if self.spare => return Ok(Owned::IfMissing),
                Some(own) if own == self.configuration => {}
                _ => return Ok(Owned::No),
            }
        }
        self.rank += 1;
        Ok(if (self.first..self.end).contains(&(self.rank - 1)) { Owned::Yes } else { Owned::No })
    }

    /// Whether no line that follows is the run's own.
    #[must_use]
    pub fn is_over(&self) -> bool {
        // Lines that had a result may stand anywhere.
        self.rank >= self.end && !self.spare
    }
}

/// What an input holds, and what of it is there already.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Survey {
    /// Request lines of the input.
    pub total: u64,
    /// Of these, the run's own.
    pub own: u64,
    /// Of the run's own, those with a result.
    pub done: u64,
    /// Of these, error results.
    pub failed: u64,
    /// The first of the run's own lines without a result, by its number in the input.
    pub first_missing: Option<u64>,
}

/// Reads the input once and compares it with the results. `None` when it was asked to stop.
///
/// # Errors
/// When the input or the assignment cannot be read.
pub fn survey(
    input: &mut File,
    division: &Division,
    results: &mut Results,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Survey>, RunFailure> {
    let reader = |input: &mut File| -> Result<_, RunFailure> {
        input.rewind().map_err(read_error)?;
        Ok(BufReader::with_capacity(READ_BYTES, input.try_clone().map_err(read_error)?))
    };
    let mut survey = Survey::default();
    let mut share = Share::all();
    if !division.is_whole() {
        let counted = lines::count(reader(input)?, MAX_LINE_BYTES, stop).map_err(read_error)?;
        let Some(total) = counted else { return Ok(None) };
        survey.total = total;
        share = division.share(total)?;
    }
    let mut lines = Lines::new(reader(input)?, MAX_LINE_BYTES);
    while !share.is_over() {
        if survey.own % 1024 == 0 && stop() {
            return Ok(None);
        }
        let Some(line) = lines.next_line().map_err(read_error)? else { break };
        let owned = share.owns_next()?;
        if owned == Owned::No {
            continue;
        }
        let entry = results.get(line.place).map_err(crate::batch_file::OutputError::from)?;
        let entry = entry.filter(|entry| entry.request == line.content.checksum());
        if owned == Owned::IfMissing && entry.is_some() {
            continue;
        }
        survey.own += 1;
        match entry {
            Some(entry) => {
                survey.done += 1;
                survey.failed += u64::from(entry.failed);
            }
            None => {
                survey.first_missing.get_or_insert(line.number);
            }
        }
    }
    input.rewind().map_err(read_error)?;
    if division.is_whole() {
        survey.total = survey.own;
    }
    Ok(Some(survey))
}

fn read_error(source: io::Error) -> RunFailure {
    RunFailure::Read { path: PathBuf::new(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assignment::Writer;
    use proptest::prelude::*;

    fn own(division: &Division, total: u64) -> Vec<u64> {
        let mut share = division.share(total).unwrap();
        (0..total).filter(|_| share.owns_next().unwrap() == Owned::Yes).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn each_line_belongs_to_one_block_of_one_configuration(
            configurations in prop::collection::vec(0..3u32, 0..60),
            shards in 1..9u32,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut writer = Writer::create(&dir.path().join("a")).unwrap();
            configurations.iter().for_each(|configuration| writer.push(*configuration).unwrap());
            let assignment = writer.finish().unwrap();
            let total = configurations.len() as u64;
            let mut seen = vec![0; configurations.len()];
            for configuration in 0..3 {
                let mut lengths = Vec::new();
                for shard in 0..shards {
                    let division =
                        Division { shards, shard, rest: None, assignment: Some(assignment.clone()), configuration };
                    let lines = own(&division, total);
                    lengths.push(lines.len());
                    for line in lines {
                        prop_assert_eq!(configurations[line as usize], configuration);
                        seen[line as usize] += 1;
                    }
                }
                let (most, least) = (lengths.iter().max().unwrap(), lengths.iter().min().unwrap());
                prop_assert!(most - least <= 1, "{:?}", lengths);
            }
            prop_assert!(seen.iter().all(|times| *times == 1), "{:?}", seen);
        }
    }

    proptest! {
        #[test]
        fn the_rest_of_a_block_is_divided_so_that_each_of_its_lines_belongs_to_one_pod(
            total in 0..80u64, of in 1..6u32, block in 0..6u32, from in 0..40u64, shards in 1..7u32,
        ) {
            let block = block % of;
            let whole = own(&Division { shards: of, shard: block, ..Division::whole() }, total);
            let rest = Some(Rest { shards: of, shard: block, from });
            let pieces: Vec<Vec<u64>> =
                (0..shards).map(|shard| own(&Division { shards, shard, rest, ..Division::whole() }, total)).collect();
            prop_assert_eq!(pieces.concat(), whole.clone());
            let left = |lines: &Vec<u64>| lines.iter().filter(|line| **line >= whole[0] + from).count();
            if let (Some(most), Some(least)) = (pieces.iter().map(left).max(), pieces.iter().map(left).min()) {
                prop_assert!(whole.is_empty() || most - least <= 1, "what is left is divided evenly: {:?}", pieces);
            }
        }
    }

    #[test]
    fn lines_that_had_a_result_are_nobodys_and_the_first_pods_if_they_lack_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&dir.path().join("a")).unwrap();
        [FINISHED, 0, 1, FINISHED, 0, 1, 0, FINISHED].iter().for_each(|byte| writer.push(*byte).unwrap());
        let assignment = Some(writer.finish().unwrap());
        let owned = |configuration, shard, rest: Option<Rest>| {
            let division = Division { shards: 2, shard, rest, assignment: assignment.clone(), configuration };
            let mut share = division.share(8).unwrap();
            let mut told = String::new();
            while !share.is_over() && told.len() < 8 {
                told.push(match share.owns_next().unwrap() {
                    Owned::No => '-',
                    Owned::Yes => 'y',
                    Owned::IfMissing => '?',
                });
            }
            told
        };
        assert_eq!((owned(0, 0, None).as_str(), owned(0, 1, None).as_str()), ("?y-?---?", "----y-y"));
        assert_eq!((owned(1, 0, None).as_str(), owned(1, 1, None).as_str()), ("--y", "-----y"));
        // Where the rest of a block is divided nobody else is at work.
        let rest = Some(Rest { shards: 2, shard: 1, from: 0 });
        assert_eq!((owned(1, 0, rest).as_str(), owned(1, 1, rest).as_str()), ("?--?---?", "-----y"));
    }

    #[test]
    fn a_survey_counts_lines_that_lost_their_result() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in.jsonl");
        std::fs::write(&path, "a\nb\nc\nd\n").unwrap();
        let mut writer = Writer::create(&dir.path().join("a")).unwrap();
        [FINISHED, FINISHED, 0, 0].iter().for_each(|byte| writer.push(*byte).unwrap());
        let division = Division { assignment: Some(writer.finish().unwrap()), ..Division::whole() };
        let parts = crate::batch_file::parts::Parts::of(&dir.path().join("out"), "u").unwrap();
        std::fs::create_dir_all(parts.dir()).unwrap();
        let mut results = Results::open(&parts, &[], &parts.dir().join("index")).unwrap();
        let request = crate::batch_file::Content::Bytes(b"b").checksum();
        let entry = crate::batch_file::index::Entry { part: 0, offset: 0, length: 1, request, failed: false };
        results.set(1, Some(entry)).unwrap();
        let survey = survey(&mut File::open(&path).unwrap(), &division, &mut results, &|| false).unwrap().unwrap();
        assert_eq!((survey.total, survey.own, survey.done, survey.first_missing), (4, 3, 0, Some(1)));
    }

    #[test]
    fn blocks_are_contiguous_and_an_assignment_of_another_input_is_refused() {
        let division = |shard| Division { shards: 3, shard, ..Division::whole() };
        assert_eq!([0, 1, 2].map(|shard| own(&division(shard), 8)), [vec![0, 1], vec![2, 3, 4], vec![5, 6, 7]]);
        assert_eq!([0, 1, 2].map(|shard| own(&division(shard), 1)), [vec![], vec![], vec![0]]);
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&dir.path().join("a")).unwrap();
        writer.push(0).unwrap();
        let assignment = Some(writer.finish().unwrap());
        let error = Division { assignment, ..Division::whole() }.share(2).err().unwrap().to_string();
        assert!(error.contains("covers 1 requests; the input has 2"), "{error}");
    }
}
