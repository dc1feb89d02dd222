//! Watts of a busy and an idle CPU (hardware thread) by processor model.
//!
//! The busy figure is the vendor's stated thermal design power (for Intel's client parts the "processor base power") of
//! one named part, divided by its hardware threads. TDP is a cooling figure, not a measurement: a processor can draw more
//! for seconds (turbo) and much less under light work. No vendor states idle power; the idle figure is [`IDLE_SHARE`] of
//! the busy one, an assumption of ours. Where a figure matters, measure and set it.

use crate::units::Milliwatts;

/// What the estimate multiplies CPU time by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watts {
    /// Power of one busy CPU, its share of idle power included.
    pub busy_per_cpu: Milliwatts,
    /// Power of one idle CPU.
    pub idle_per_cpu: Milliwatts,
    /// Where the figures come from, for the report.
    pub origin: String,
}

/// Idle power as a share of busy power, in percent: an assumption, see the module.
pub const IDLE_SHARE: u64 = 20;

/// Busy watts per hardware thread where nothing is known of the processor, in milliwatts: an assumption between the
/// server parts (1.4 to 4.3 W) and the mobile parts (1.9 to 3.5 W) of the table.
pub const GENERIC_MILLIWATTS: u64 = 2500;

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Found anywhere in the model name of /proc/cpuinfo; the first row that fits counts.
    pub pattern: &'static str,
    /// The part whose figures stand for the row.
    pub part: &'static str,
    /// Its thermal design power in watts, as the vendor states it.
    pub tdp_watts: u64,
    /// Its hardware threads.
    pub threads: u64,
}

const fn row(pattern: &'static str, part: &'static str, tdp_watts: u64, threads: u64) -> Row {
    Row { pattern, part, tdp_watts, threads }
}

/// The table. Exact parts stand before families, families before makers.
pub const TABLE: &[Row] = &[
    row("EPYC 7601", "EPYC 7601", 180, 64),
    row("EPYC 7742", "EPYC 7742", 225, 128),
    row("EPYC 7763", "EPYC 7763", 280, 128),
    row("EPYC 9654", "EPYC 9654", 360, 192),
    row("EPYC 9754", "EPYC 9754", 360, 256),
    row("EPYC-Rome", "EPYC 7742", 225, 128),
    row("EPYC-Milan", "EPYC 7763", 280, 128),
    row("EPYC-Genoa", "EPYC 9654", 360, 192),
    row("EPYC 9", "EPYC 9654", 360, 192),
    row("EPYC", "EPYC 7763", 280, 128),
    row("Platinum 8592", "Xeon Platinum 8592+", 350, 128),
    row("Platinum 8480", "Xeon Platinum 8480+", 350, 112),
    row("Platinum 8380", "Xeon Platinum 8380", 270, 80),
    row("Platinum 8280", "Xeon Platinum 8280", 205, 56),
    row("Gold 6148", "Xeon Gold 6148", 150, 40),
    row("E5-2680 v4", "Xeon E5-2680 v4", 120, 28),
    row("E5-2690 v4", "Xeon E5-2690 v4", 135, 28),
    row("SapphireRapids", "Xeon Platinum 8480+", 350, 112),
    row("Icelake", "Xeon Platinum 8380", 270, 80),
    row("Cascadelake", "Xeon Platinum 8280", 205, 56),
    row("Xeon", "Xeon Platinum 8380", 270, 80),
    row("Ryzen 9 7950X", "Ryzen 9 7950X", 170, 32),
    row("Ryzen 9 5950X", "Ryzen 9 5950X", 105, 32),
    row("Ryzen 7 5800X", "Ryzen 7 5800X", 105, 16),
    row("Ryzen 7 7840U", "Ryzen 7 7840U", 28, 16),
    row("i9-13900K", "Core i9-13900K", 125, 32),
    row("i7-12700H", "Core i7-12700H", 45, 20),
    row("i7-1165G7", "Core i7-1165G7", 28, 8),
    row("i7-8550U", "Core i7-8550U", 15, 8),
];

impl Watts {
    /// Figures that were set by hand.
    #[must_use]
    pub fn set(busy_per_cpu: Milliwatts, idle_per_cpu: Milliwatts) -> Self {
        Self { busy_per_cpu, idle_per_cpu, origin: "watts set by hand".to_owned() }
    }

    /// Figures of the table for a model name as /proc/cpuinfo gives it, or the generic ones.
    #[must_use]
    pub fn by_model(model: Option<&str>) -> Self {
        let found = model.and_then(|model| TABLE.iter().find(|row| model.contains(row.pattern)));
        let (busy, origin) = match found {
            Some(row) => {
                let origin = format!("table: TDP {} W / {} threads of {}", row.tdp_watts, row.threads, row.part);
                (row.tdp_watts * 1000 / row.threads, origin)
            }
            None => (GENERIC_MILLIWATTS, "generic default, processor not in the table".to_owned()),
        };
        Self {
            busy_per_cpu: Milliwatts(busy),
            idle_per_cpu: Milliwatts(busy * IDLE_SHARE / 100),
            origin: format!("{origin}, idle {IDLE_SHARE} % assumed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_parts_win_over_families_and_families_over_makers() {
        let cases = [
            (Some("AMD EPYC 7763 64-Core Processor"), 2187, "EPYC 7763"),
            (Some("AMD EPYC 9654 96-Core Processor"), 1875, "EPYC 9654"),
            (Some("AMD EPYC-Genoa Processor"), 1875, "EPYC 9654"),
            (Some("AMD EPYC"), 2187, "EPYC 7763"),
            (Some("Intel(R) Xeon(R) Platinum 8480CL"), 3125, "8480+"),
            (Some("Intel(R) Xeon(R) CPU @ 2.20GHz"), 3375, "8380"),
            (Some("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz"), 3500, "i7-1165G7"),
            (Some("QEMU Virtual CPU version 2.5+"), 2500, "generic"),
            (None, 2500, "generic"),
        ];
        for (model, busy, origin) in cases {
            let watts = Watts::by_model(model);
            assert_eq!(watts.busy_per_cpu, Milliwatts(busy), "{model:?}");
            assert_eq!(watts.idle_per_cpu, Milliwatts(busy / 5), "{model:?}");
            assert!(watts.origin.contains(origin), "{model:?}: {}", watts.origin);
        }
    }

    #[test]
    fn every_row_can_be_reached_and_is_sane() {
        for (number, row) in TABLE.iter().enumerate() {
            let hit = TABLE.iter().position(|earlier| row.pattern.contains(earlier.pattern));
            assert_eq!(hit, Some(number), "{} is hidden by an earlier row", row.pattern);
            let busy = row.tdp_watts * 1000 / row.threads;
            assert!((1_000..10_000).contains(&busy), "{}: {busy} mW", row.pattern);
        }
    }
}
