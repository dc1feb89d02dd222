//! Energy meters: RAPL, model-based estimate; windows and their provenance.
