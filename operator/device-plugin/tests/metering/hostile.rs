//! Clients that do what they should not: memory stays bounded, the error is clear, the others are unharmed.

use crate::fake_node::FakeNode;
use joulecast_device_plugin::metering::MAX_WINDOWS;
use joulecast_device_plugin::service::{self, MAX_CONNECTIONS};
use joulecast_device_plugin::slots::SOCKET;
use joulecast_meter::Meter;
use joulecast_meter::slot::{Answer, MAX_REQUEST_BYTES, Refusal, SlotMeter};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

/// The sockets of a fake node's slots, served on a thread.
struct Served {
    _node: FakeNode,
    sockets: Vec<PathBuf>,
    _stop: tokio::sync::oneshot::Sender<()>,
}

fn served(slots: usize) -> Served {
    let node = FakeNode::new(slots);
    let directories: Vec<PathBuf> = (0..slots).map(|id| node.path(&format!("run/cpu-{id}"))).collect();
    let service = node.service(node.metering(), node.running_clock());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (ready, is_ready) = mpsc::channel();
    let own = directories.clone();
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let (_running, stopped_agent) = tokio::sync::watch::channel(false);
            for (id, directory) in own.iter().enumerate() {
                let listener = service::listen(directory, SOCKET).unwrap();
                tokio::spawn(service::serve(service.clone(), format!("cpu-{id}"), listener, stopped_agent.clone()));
            }
            ready.send(()).unwrap();
            let _ = stopped.await;
        });
    });
    is_ready.recv().unwrap();
    let sockets = directories.iter().map(|directory| directory.join(SOCKET)).collect();
    Served { _node: node, sockets, _stop: stop }
}

fn connect(served: &Served, slot: usize) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(&served.sockets[slot]).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    BufReader::new(stream)
}

fn say(stream: &mut BufReader<UnixStream>, bytes: &[u8]) -> Answer {
    stream.get_mut().write_all(bytes).unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

fn reason(answer: &Answer) -> Option<Refusal> {
    if let Answer::Refused { reason, .. } = answer { Some(*reason) } else { None }
}

/// Another slot's pod is metered as if nothing was.
fn others_are_unharmed(served: &Served) {
    let (mut meter, _) = SlotMeter::open(&served.sockets[1], Some("calm"), &mut |_| ()).unwrap();
    assert!(meter.sample(Duration::ZERO).gross.is_some());
    assert!(meter.finish(Duration::ZERO).gross.is_some());
}

#[test]
fn what_is_no_request_ends_its_connection_with_a_reason() {
    let served = served(2);
    let long = vec![b'x'; MAX_REQUEST_BYTES + 1];
    for bytes in [
        b"\n".as_slice(),
        b"{}\n",
        b"[]\n",
        b"GET / HTTP/1.1\r\n",
        b"\xff\xfe\n",
        br#"{"open":{"pod":"other"}}
"#,
        br#"{"mark":{"window":-1}}
"#,
        br#"{"mark":{"window":1}}{"mark":{"window":1}}
"#,
        &long,
    ] {
        let mut stream = connect(&served, 0);
        assert_eq!(reason(&say(&mut stream, bytes)), Some(Refusal::Malformed), "{:?}", String::from_utf8_lossy(bytes));
        let mut rest = Vec::new();
        // A reset is an end too: what was not read of a long line makes the kernel say so.
        assert!(stream.read_to_end(&mut rest).is_err() || rest.is_empty());
    }
    others_are_unharmed(&served);
}

#[test]
fn ten_thousand_windows_are_not_to_be_had() {
    let served = served(2);
    let mut stream = connect(&served, 0);
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..2_000 {
        match say(&mut stream, b"{\"open\":{}}\n") {
            Answer::Opened { .. } => opened += 1,
            answer => {
                assert_eq!(reason(&answer), Some(Refusal::TooMany));
                refused += 1;
            }
        }
    }
    assert_eq!((opened, refused), (MAX_WINDOWS, 2_000 - MAX_WINDOWS));
    others_are_unharmed(&served);
}

#[test]
fn a_client_that_never_reads_or_never_ends_its_line_harms_nobody() {
    let served = served(2);
    let mut deaf = UnixStream::connect(&served.sockets[0]).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    // Until the buffers between are full: the service waits for this client, and for no other.
    while deaf.write_all(&b"{\"mark\":{\"window\":1}}\n".repeat(100)).is_ok() {}
    let mut mute = UnixStream::connect(&served.sockets[0]).unwrap();
    mute.write_all(b"{\"open\"").unwrap();
    others_are_unharmed(&served);
    assert!(matches!(say(&mut connect(&served, 0), b"{\"open\":{}}\n"), Answer::Opened { .. }), "its own pod neither");
}

#[test]
fn a_slot_has_so_many_connections() {
    let served = served(2);
    let mut held: Vec<_> = (0..MAX_CONNECTIONS).map(|_| connect(&served, 0)).collect();
    for stream in &mut held {
        assert_eq!(reason(&say(stream, b"{\"mark\":{\"window\":9}}\n")), Some(Refusal::UnknownWindow));
    }
    let mut line = String::new();
    connect(&served, 0).read_line(&mut line).unwrap();
    assert!(line.contains("TooMany"), "{line}");
    others_are_unharmed(&served);
    drop(held);
    let again = std::iter::repeat_with(|| {
        std::thread::sleep(Duration::from_millis(10));
        let mut stream = connect(&served, 0);
        stream.get_mut().write_all(b"{\"mark\":{\"window\":9}}\n").unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        line
    });
    assert!(again.take(500).any(|line| line.contains("UnknownWindow")), "seats come back");
}

#[test]
fn any_user_of_the_pod_may_connect_and_nobody_lists_more_than_the_socket() {
    let served = served(1);
    let socket = &served.sockets[0];
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(socket), mode(socket.parent().unwrap())), (0o666, 0o755));
}

#[test]
fn random_lines_never_stop_the_service() {
    let served = served(2);
    let mut runner = TestRunner::new(Config { cases: 400, ..Config::default() });
    let word = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "open",
        "mark",
        "close",
        "window",
        "job",
        "null",
        "1",
        "-",
        "1e999",
        "\\u0000",
        " ",
        "é",
        "\u{0}",
        "18446744073709551616",
    ]);
    let line = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        prop::collection::vec(word, 0..40).prop_map(|words| words.concat().into_bytes()),
        any::<u64>().prop_map(|window| format!("{{\"close\":{{\"window\":{window}}}}}").into_bytes()),
    ];
    runner
        .run(&line, |mut line| {
            line.retain(|byte| *byte != b'\n');
            line.push(b'\n');
            let answer = say(&mut connect(&served, 0), &line);
            prop_assert!(
                matches!(&answer, Answer::Opened { .. })
                    || matches!(reason(&answer), Some(Refusal::Malformed | Refusal::UnknownWindow | Refusal::TooMany)),
                "{answer:?}"
            );
            Ok(())
        })
        .unwrap();
    others_are_unharmed(&served);
}
