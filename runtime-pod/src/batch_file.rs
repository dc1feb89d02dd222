//! OpenAI Batch JSONL: requests in, results out, in memory that does not grow with the files.

pub mod file_error;
pub mod ids;
pub mod index;
pub mod lines;
pub mod merged;
pub mod output;
pub mod parts;
pub mod record;
pub mod request;
pub mod result;
pub mod results;

pub use ids::CustomIds;
pub use lines::{Content, Line, Lines, MAX_LINE_BYTES};
pub use merged::Finished;
pub use output::{Output, OutputError};
pub use request::{BatchRequest, Endpoint, LineProblem, Prompt};
