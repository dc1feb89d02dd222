//! The pod's side against a fake agent that answers from a list.

use super::*;
use crate::slot::WindowStatus;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;
use tempfile::TempDir;

/// A fake agent: for each connection, what it answers to each request; then it hangs up. It returns what it was asked.
fn fake_agent(connections: Vec<Vec<String>>) -> (TempDir, PathBuf, JoinHandle<Vec<String>>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let mut asked = Vec::new();
        for answers in connections {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            for answer in answers {
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                asked.push(line.trim().to_owned());
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        }
        asked
    });
    (dir, path, thread)
}

fn line(answer: &Answer) -> String {
    serde_json::to_string(answer).unwrap() + "\n"
}

fn opened() -> String {
    line(&Answer::Opened { window: 7, meter: "agent".into(), idle_milliwatts: Some(9000) })
}

fn energy(gross: Option<u64>) -> String {
    line(&Answer::Window(WindowEnergy {
        window: 7,
        status: if gross.is_some() { WindowStatus::Complete } else { WindowStatus::Partial },
        length_microseconds: 5,
        gross_microjoules: gross,
        idle_microjoules: None,
        domain_microjoules: gross.map(|gross| ("package-0".to_owned(), gross)).into_iter().collect(),
        notes: if gross.is_some() { vec![] } else { vec!["package-0 lost".into()] },
        gpu: gross.map(|gross| GpuUse { mean_millis: Some(gross), ..GpuUse::default() }),
        device_lost: gross.is_none().then(|| "gpu-0 is lost".to_owned()),
    }))
}

#[test]
fn a_window_is_opened_read_and_closed() {
    let (_dir, path, agent) = fake_agent(vec![vec![opened(), energy(Some(5)), energy(None), energy(Some(9))]]);
    let (mut meter, idle) = SlotMeter::open(&path, Some("j"), &mut |_| ()).unwrap();
    assert_eq!((idle, meter.describe().as_str(), meter.source()), (Some(Milliwatts(9000)), "agent", Source::Measured));
    let totals = meter.sample(Duration::from_secs(1));
    assert_eq!((totals.gross, totals.domains["package-0"]), (Some(Microjoules(5)), Microjoules(5)));
    assert_eq!(meter.sample(Duration::from_secs(2)).gross, None);
    assert_eq!(meter.gpu().mean_millis, Some(5), "an answer that does not tell it takes nothing back");
    assert_eq!((meter.notes(), meter.device_lost()), (vec!["package-0 lost".to_owned()], Some("gpu-0 is lost")));
    assert_eq!(meter.finish(Duration::from_secs(3)).gross, Some(Microjoules(9)));
    assert_eq!(meter.gpu().mean_millis, Some(9));
    assert_eq!(meter.device_lost(), Some("gpu-0 is lost"), "a lost device does not come back");
    drop(meter);
    let mark = r#"{"mark":{"window":7}}"#;
    assert_eq!(agent.join().unwrap(), [r#"{"open":{"job":"j"}}"#, mark, mark, r#"{"close":{"window":7}}"#]);
}

#[test]
fn an_agent_that_was_away_is_found_again() {
    let connections = vec![vec![opened(), energy(Some(5))], vec![energy(Some(8))], vec![energy(Some(9))]];
    let (_dir, path, agent) = fake_agent(connections);
    let (mut meter, _) = SlotMeter::open(&path, None, &mut |_| ()).unwrap();
    let s = Duration::from_secs;
    assert_eq!(meter.sample(s(1)).gross, Some(Microjoules(5)));
    // The agent hung up: one reading fails at most, the next connects anew.
    let second = [meter.sample(s(2)).gross, meter.sample(s(3)).gross];
    assert!(second.contains(&Some(Microjoules(8))), "{second:?}");
    assert_eq!(meter.finish(s(4)).gross, Some(Microjoules(9)), "the last reading is asked for again and again");
    assert!(meter.notes()[0].contains("readings failed"), "{:?}", meter.notes());
    agent.join().unwrap();
}

#[test]
fn what_does_not_work_is_said() {
    let refused = |reason| line(&Answer::Refused { reason, message: "why".into() });
    let cases = [
        (refused(Refusal::NoMeter), "NoMeter"),
        ("garbage\n".to_owned(), "not understood"),
        (energy(Some(1)), "unexpected"),
        (refused(Refusal::TooMany), "TooMany"),
    ];
    for (answer, text) in cases {
        let (_dir, path, _agent) = fake_agent(vec![vec![answer]]);
        let error = SlotMeter::open(&path, None, &mut |_| panic!("asking again does not help")).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
    let (_dir, path, _agent) = fake_agent(vec![vec![refused(Refusal::NotReady), opened()]]);
    let mut waited = 0;
    SlotMeter::open(&path, None, &mut |_| waited += 1).unwrap();
    assert_eq!(waited, 1);
    let mut waited = 0;
    let error = SlotMeter::open(Path::new("/nonexistent/socket"), None, &mut |_| waited += 1).unwrap_err();
    assert_eq!(waited, ATTEMPTS - 1);
    assert!(error.to_string().contains("/nonexistent/socket") && error.to_string().contains("node agent"), "{error}");
}
