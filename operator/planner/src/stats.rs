//! The statistics behind the paper form and the comparison: tail probabilities, regression and analysis of variance.

pub mod anova;
pub mod groups;
pub mod regression;
pub mod special;
pub mod tails;
