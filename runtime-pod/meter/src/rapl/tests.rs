//! RAPL against fake powercap trees in temporary directories.

use super::*;
use std::fs;
use tempfile::TempDir;

const RANGE: u64 = 262_143_328_850;

/// A fake powercap tree.
struct FakePowercap(TempDir);

impl FakePowercap {
    fn new(zones: &[(&str, &str, u64)]) -> Self {
        let fake = Self(tempfile::tempdir().unwrap());
        for (id, name, energy) in zones {
            let dir = fake.0.path().join(id);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("name"), format!("{name}\n")).unwrap();
            fs::write(dir.join("max_energy_range_uj"), format!("{RANGE}\n")).unwrap();
            fake.set(id, *energy);
        }
        fake
    }

    fn set(&self, id: &str, energy: u64) {
        fs::write(self.0.path().join(id).join("energy_uj"), format!("{energy}\n")).unwrap();
    }

    /// Permission bits do not stop root, who may run the tests; a directory in the counter's place stops everybody.
    fn make_unreadable(&self, id: &str) {
        let path = self.0.path().join(id).join("energy_uj");
        fs::remove_file(&path).unwrap();
        fs::create_dir(path).unwrap();
    }

    fn vanish(&self, id: &str) {
        fs::remove_file(self.0.path().join(id).join("energy_uj")).unwrap();
    }

    fn open(&self) -> Result<Rapl, RaplError> {
        Rapl::open(self.0.path(), Duration::ZERO)
    }
}

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Two packages with dram, one with core, a platform zone, and the packages once more through MMIO.
fn server() -> FakePowercap {
    FakePowercap::new(&[
        ("intel-rapl:0", "package-0", 100),
        ("intel-rapl:0:0", "core", 10),
        ("intel-rapl:0:1", "dram", 20),
        ("intel-rapl:1", "package-1", 200),
        ("intel-rapl:1:0", "dram", 30),
        ("intel-rapl:2", "psys", 1000),
        ("intel-rapl-mmio:0", "package-0", 5),
    ])
}

#[test]
fn gross_is_packages_and_dram_and_nothing_twice() {
    let fake = server();
    let mut rapl = fake.open().unwrap();
    for (id, energy) in [
        ("intel-rapl:0", 1_000_100),
        ("intel-rapl:0:0", 900_010),
        ("intel-rapl:0:1", 200_020),
        ("intel-rapl:1", 3_000_200),
        ("intel-rapl:1:0", 400_030),
        ("intel-rapl:2", 9_001_000),
    ] {
        fake.set(id, energy);
    }
    let totals = rapl.sample(s(1));
    assert_eq!(totals.gross, Some(Microjoules(1_000_000 + 200_000 + 3_000_000 + 400_000)));
    assert_eq!(totals.domains["psys"], Microjoules(9_000_000));
    assert_eq!(totals.domains["package-0/core"], Microjoules(900_000));
    assert_eq!(totals.domains.len(), 6);
    assert_eq!(rapl.describe(), "rapl (package-0 + package-0/dram + package-1 + package-1/dram)");
    assert_eq!(rapl.notes(), Vec::<String>::new());
}

#[test]
fn a_nested_tree_gives_the_same_zones() {
    let fake = FakePowercap::new(&[
        ("intel-rapl/intel-rapl:0", "package-0", 1),
        ("intel-rapl/intel-rapl:0/intel-rapl:0:0", "dram", 2),
        ("intel-rapl/intel-rapl:0/intel-rapl:0:1", "mystery", 3),
    ]);
    let rapl = fake.open().unwrap();
    assert_eq!(rapl.describe(), "rapl (package-0 + package-0/dram)");
    assert!(rapl.notes()[0].contains("package-0/mystery is not a known domain"), "{:?}", rapl.notes());
}

#[test]
fn a_wrap_is_counted() {
    let fake = FakePowercap::new(&[("intel-rapl:0", "package-0", RANGE - 1_000_000)]);
    let mut rapl = fake.open().unwrap();
    fake.set("intel-rapl:0", 500_000);
    assert_eq!(rapl.sample(s(1)).gross, Some(Microjoules(1_500_000)));
}

#[test]
fn a_vanished_zone_is_absent_and_comes_back_whole() {
    let fake = server();
    let mut rapl = fake.open().unwrap();
    fake.vanish("intel-rapl:0:1");
    let totals = rapl.sample(s(1));
    assert_eq!(totals.gross, None, "without dram the gross figure would be too small");
    assert_eq!(totals.domains["package-0"], Microjoules(0));
    assert!(!totals.domains.contains_key("package-0/dram"), "absent, not 0");
    assert_eq!(rapl.notes(), ["package-0/dram absent: the zone vanished"]);

    fake.set("intel-rapl:0:1", 520);
    assert_eq!(rapl.sample(s(2)).gross, Some(Microjoules(500)));
    assert_eq!(rapl.notes(), ["package-0/dram: 1 failed readings, bridged by later ones"]);

    fake.vanish("intel-rapl:0:1");
    rapl.sample(s(3));
    fake.set("intel-rapl:0:1", 600);
    assert_eq!(rapl.sample(s(1000)).gross, None, "after so long a wrap cannot be excluded");
    assert!(rapl.notes().iter().any(|note| note.contains("more than one wrap")), "{:?}", rapl.notes());
}

#[test]
fn an_unreadable_subzone_is_left_out_with_a_note() {
    let fake = server();
    fake.make_unreadable("intel-rapl:1:0");
    let mut rapl = fake.open().unwrap();
    assert_eq!(rapl.describe(), "rapl (package-0 + package-0/dram + package-1)");
    assert!(rapl.notes()[0].contains("package-1/dram unreadable"), "{:?}", rapl.notes());
    assert!(rapl.notes()[0].contains("gross does not cover it"), "{:?}", rapl.notes());
    assert_eq!(rapl.sample(s(1)).gross, Some(Microjoules(0)));
}

#[test]
fn refusals_say_what_is_missing() {
    let unreadable = server();
    unreadable.make_unreadable("intel-rapl:1");
    let garbage = FakePowercap::new(&[("intel-rapl:0", "package-0", 0)]);
    fs::write(garbage.0.path().join("intel-rapl:0/energy_uj"), "none\n").unwrap();
    let cases = [
        (FakePowercap::new(&[]), "no RAPL zone"),
        (FakePowercap::new(&[("intel-rapl-mmio:0", "package-0", 0)]), "no RAPL zone"),
        (FakePowercap::new(&[("intel-rapl:0", "psys", 0)]), "no package among them: psys"),
        (unreadable, "gross energy needs every package"),
        (garbage, "not a number"),
    ];
    for (fake, text) in cases {
        let error = fake.open().unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let error = Rapl::open(Path::new("/nonexistent/powercap"), Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("no RAPL zone"), "{error}");
}
