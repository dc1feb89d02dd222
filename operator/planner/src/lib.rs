//! Pure core of Joulecast: units, energy models, fit, plan.
