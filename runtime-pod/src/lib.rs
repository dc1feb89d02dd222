//! One run of one engine in one pod: engines, the generation loop, what feeds it, and what measures it.

pub mod artifact_digest;
pub mod assignment;
pub mod attribution;
pub mod batch_file;
pub mod bench;
pub mod bucket;
pub mod cpu;
pub mod engine;
pub mod fail_point;
pub mod generate;
pub mod install;
pub mod limits;
pub mod memory;
pub mod plan_step;
pub mod pod;
pub mod print_file;
pub mod profile;
pub mod progress;
pub mod quality;
pub mod random_model;
pub mod report;
pub mod request_sums;
pub mod run;
pub mod stop;
pub mod threads;
pub mod tokenizer;
