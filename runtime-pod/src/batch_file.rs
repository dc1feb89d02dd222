//! OpenAI Batch JSONL: requests in, results out, in memory that does not grow with the files.

pub mod file_error;
pub mod ids;
pub mod lines;
pub mod output;
pub mod request;
pub mod result;

pub use ids::CustomIds;
pub use lines::{Content, Line, Lines, MAX_LINE_BYTES};
pub use output::{Finished, Output, OutputError};
pub use request::{BatchRequest, Endpoint, LineProblem, Prompt};
