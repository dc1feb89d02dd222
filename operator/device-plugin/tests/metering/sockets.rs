//! The socket of a slot while agents come and go.

use crate::fake_node::FakeNode;
use joulecast_device_plugin::service;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// Whether somebody answers there.
async fn answers(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket).await else { return false };
    let sent = stream.write_all(b"{\"mark\":{\"window\":99}}\n").await;
    let mut answer = [0; 10];
    sent.is_ok() && stream.read_exact(&mut answer).await.is_ok() && &answer == b"{\"refused\""
}

#[tokio::test]
async fn an_agent_that_ends_leaves_the_socket_of_the_next_and_one_that_was_removed_comes_back() {
    let node = FakeNode::new(1);
    let service = node.service(node.metering(), node.clock());
    let directory = node.path("run/cpu-0");
    let socket = directory.join("meter.sock");
    let agent = || {
        let listening = service::listen(&directory, "meter.sock").unwrap();
        let (stop, stopped) = watch::channel(false);
        (stop, tokio::spawn(service::serve(Arc::clone(&service), "cpu-0".into(), listening, stopped)))
    };
    let (stop_first, first) = agent();
    assert!(answers(&socket).await);
    let (stop_second, second) = agent();
    stop_first.send(true).unwrap();
    first.await.unwrap();
    assert!(answers(&socket).await, "the first agent took the second's socket with it");

    std::fs::remove_file(&socket).unwrap();
    let back = async {
        while !answers(&socket).await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), back).await.expect("the socket comes back");
    stop_second.send(true).unwrap();
    second.await.unwrap();
    assert!(!socket.exists());
}
