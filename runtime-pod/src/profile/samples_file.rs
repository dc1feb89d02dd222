//! The samples of a campaign: a CSV file that grows by a line with every measurement, and from which an interrupted
//! campaign goes on. The first nine columns are those that `joulecast fit` reads.

use super::grid::Point;
use super::window::Window;
use super::{Campaign, EndedBy};
use crate::report::{engine_name, provider};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The header.
pub const HEADER: &str = "model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s,requests,window_s,source,seed,round,at_unix_s";
/// Largest file that is read back, in bytes: a hundred million would be no campaign.
const MOST_BYTES: u64 = 256 << 20;

/// Why a samples file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SamplesFileError {
    /// The system said no.
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It holds samples of something else.
    #[error("{}: line {line} is of {found}, not of {wanted}: give another path, or remove the file", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// What it is of.
        found: String,
        /// What is measured here.
        wanted: String,
    },
    /// It is no samples file of a campaign.
    #[error("{}: line {line}: {problem}: give another path, or remove the file", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// What is wrong.
        problem: String,
    },
}

/// What all samples of a file are of: the first four columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity(pub String);

impl Identity {
    /// Of a campaign.
    #[must_use]
    pub fn of(campaign: &Campaign) -> Self {
        // Names of Kubernetes objects and of the enums hold no commas or quotes; a name from a command line may.
        let model: String = campaign.model.chars().map(|c| if ",\"\r\n".contains(c) { '_' } else { c }).collect();
        let (engine, provider) = (engine_name(campaign.load.engine), provider(campaign.load.provider));
        Self(format!("{model},{engine},{provider},{}", campaign.device_class))
    }
}

/// A measurement that lies in the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Taken {
    /// Where.
    pub point: Point,
    /// Joules per request.
    pub energy: Option<f64>,
    /// Device-seconds per request.
    pub runtime: f64,
    /// Length of the window.
    pub window: Duration,
    /// Joules of the window.
    pub joules: Option<f64>,
}

/// The open file.
#[derive(Debug)]
pub struct SamplesFile {
    path: PathBuf,
    file: File,
    identity: Identity,
}

impl SamplesFile {
    /// Opens a file, made if there is none, and reads what lies in it. A last line without an end, which a killed pod
    /// leaves, is cut off.
    ///
    /// # Errors
    /// [`SamplesFileError`].
    pub fn open(path: &Path, identity: &Identity) -> Result<(Self, Vec<Taken>), SamplesFileError> {
        let io = |doing| move |source| SamplesFileError::Io { doing, path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io("make its directory"))?;
        }
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io("open it for writing"))?;
        let mut text = String::new();
        Read::by_ref(&mut file).take(MOST_BYTES).read_to_string(&mut text).map_err(io("read it"))?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            file.set_len(whole as u64).map_err(io("cut off its last line"))?;
            file.seek(SeekFrom::End(0)).map_err(io("read it"))?;
            text.truncate(whole);
        }
        let taken = read_back(path, &text, identity)?;
        let mut this = Self { path: path.to_owned(), file, identity: identity.clone() };
        if text.is_empty() {
            this.write(HEADER)?;
        }
        Ok((this, taken))
    }

    /// Appends a measurement and sees that it lies on the volume.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn append(
        &mut self,
        point: Point,
        window: &Window,
        (seed, round): (u64, u32),
        source: &str,
        at_unix_s: u64,
    ) -> Result<(), SamplesFileError> {
        let Point { batch, x, y } = point;
        let joules = window.joules_per_request();
        let source = if joules.is_some() { source } else { "Unavailable" };
        let line = format!(
            "{},{batch},{x},{y},{},{:.9},{},{:.6},{source},{seed},{round},{at_unix_s}",
            self.identity.0,
            joules.map_or_else(String::new, |joules| format!("{joules:.9}")),
            window.seconds_per_request(),
            window.requests,
            window.length.as_secs_f64(),
        );
        self.write(&line)
    }

    fn write(&mut self, line: &str) -> Result<(), SamplesFileError> {
        let io = |source| SamplesFileError::Io { doing: "write to it", path: self.path.clone(), source };
        // One call, so that a line is there whole or not at all for whoever reads.
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(io)?;
        self.file.sync_data().map_err(io)
    }
}

fn read_back(path: &Path, text: &str, identity: &Identity) -> Result<Vec<Taken>, SamplesFileError> {
    let mut taken = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line_number = index + 1;
        let unreadable =
            |problem: String| SamplesFileError::Unreadable { path: path.to_owned(), line: line_number, problem };
        if index == 0 {
            if line != HEADER {
                return Err(unreadable("is not the header of a campaign's samples".to_owned()));
            }
            continue;
        }
        let cells: Vec<&str> = line.split(',').collect();
        if cells.len() != HEADER.split(',').count() {
            return Err(unreadable(format!("has {} columns instead of {}", cells.len(), HEADER.split(',').count())));
        }
        let found = cells[..4].join(",");
        if found != identity.0 {
            return Err(SamplesFileError::Other {
                path: path.to_owned(),
                line: line_number,
                found,
                wanted: identity.0.clone(),
            });
        }
        let count =
            |cell: usize| cells[cell].parse::<u32>().map_err(|_| unreadable(format!("{:?} is no count", cells[cell])));
        let number = |cell: usize| {
            let value = cells[cell].parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0);
            value.ok_or_else(|| unreadable(format!("{:?} is no measurement", cells[cell])))
        };
        let energy = if cells[7].is_empty() { None } else { Some(number(7)?) };
        let requests = f64::from(count(9)?);
        let window = number(10)?;
        taken.push(Taken {
            point: Point { batch: count(4)?, x: count(5)?, y: count(6)? },
            energy,
            runtime: number(8)?,
            window: Duration::try_from_secs_f64(window).map_err(|_| unreadable(format!("{window} s is no window")))?,
            joules: energy.map(|energy| energy * requests),
        });
    }
    Ok(taken)
}

impl EndedBy {
    /// The word in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Settled => "Settled",
            Self::Repetitions => "Repetitions",
            Self::Seconds => "Seconds",
            Self::Joules => "Joules",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use joulecast_meter::Microjoules;

    fn identity() -> Identity {
        Identity("demo,candle,cpu,cpu".into())
    }

    const POINT: Point = Point { batch: 2, x: 8, y: 16 };

    fn window(energy: Option<u64>) -> Window {
        let (length, busy) = (Duration::from_millis(1500), Duration::from_secs(1));
        Window { requests: 10, length, busy, energy: energy.map(Microjoules) }
    }

    #[test]
    fn a_file_is_read_back_and_gone_on_with() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/samples.csv");
        let (mut file, taken) = SamplesFile::open(&path, &identity()).unwrap();
        assert!(taken.is_empty());
        file.append(POINT, &window(Some(25_000_000)), (7, 0), "Modelled", 1_800_000_000).unwrap();
        file.append(POINT, &window(None), (7, 1), "Modelled", 1_800_000_000).unwrap();
        // A pod that was killed in the middle of a line.
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"demo,candle,cpu,c").unwrap();
        let (mut file, taken) = SamplesFile::open(&path, &identity()).unwrap();
        let expected = Taken {
            point: POINT,
            energy: Some(2.5),
            runtime: 0.1,
            window: Duration::from_millis(1500),
            joules: Some(25.0),
        };
        assert_eq!(taken, [expected, Taken { energy: None, joules: None, ..expected }]);
        file.append(POINT, &window(Some(1)), (7, 2), "Modelled", 1_800_000_000).unwrap();
        let groups = joulecast_planner::samples::read(fs::File::open(&path).unwrap()).unwrap();
        assert_eq!(groups.values().next().unwrap().usable.len(), 3, "joulecast fit reads it");
    }

    #[test]
    fn a_file_of_something_else_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("samples.csv");
        let (mut file, _) = SamplesFile::open(&path, &identity()).unwrap();
        file.append(POINT, &window(Some(5)), (7, 0), "Modelled", 1_800_000_000).unwrap();
        let other = Identity("other,candle,cpu,cpu".into());
        let error = SamplesFile::open(&path, &other).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("demo,candle") && error.contains("other,"), "{error}");
        for (text, told) in [
            ("a,b\n", "header"),
            (&format!("{HEADER}\nx,y\n"), "columns"),
            (&format!("{HEADER}\ndemo,candle,cpu,cpu,1,8,x,1,1,1,1,s,1,1,1\n"), "\"x\" is no count"),
        ] {
            fs::write(&path, text).unwrap();
            let error = SamplesFile::open(&path, &identity()).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text, "it was not written to");
        }
    }
}
