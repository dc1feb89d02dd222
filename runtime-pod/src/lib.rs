//! One run of one engine in one pod: engines, the generation loop, and what measures them.

pub mod cpu;
pub mod engine;
pub mod generate;
pub mod memory;
pub mod threads;
pub mod tokenizer;
