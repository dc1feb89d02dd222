use super::bucket_server::{KEY, Server};
use super::mirror::{Mirror, SEGMENT_BYTES};
use super::*;
use crate::batch_file::record::{self, Head, Scan};
use std::fs;
use std::io::BufReader;

fn address(server: &Server, key: &str) -> Address {
    let object = serde_json::from_value(server.object(key)).unwrap();
    Address { object, credentials: Some(Credentials { id: KEY.0.into(), secret: KEY.1.into(), token: None }) }
}

fn bucket() -> (Server, Bucket) {
    let server = Server::start("127.0.0.1:0");
    let bucket = Bucket::open(&address(&server, "k")).unwrap();
    (server, bucket)
}

#[test]
fn objects_are_written_found_and_removed() {
    let (server, bucket) = bucket();
    assert_eq!((bucket.get("a/b").unwrap(), bucket.length("a/b").unwrap()), (None, None));
    assert!(bucket.create("a/b", b"first".to_vec()).unwrap());
    assert!(!bucket.create("a/b", b"second".to_vec()).unwrap(), "only once");
    assert_eq!(bucket.get("a/b").unwrap().unwrap(), "first");
    bucket.put("a/b", b"third".to_vec()).unwrap();
    bucket.put("a/c", Vec::new()).unwrap();
    bucket.put("ab", Vec::new()).unwrap();
    let listed = bucket.list("a").unwrap();
    let keys: Vec<_> = listed.iter().map(|one| (one.key.as_str(), one.bytes)).collect();
    assert_eq!(keys, [("a/b", 5), ("a/c", 0)]);
    bucket.put("a/b", b"other".to_vec()).unwrap();
    assert_ne!(bucket.list("a").unwrap()[0].mark, listed[0].mark, "a change shows");
    assert!(bucket.copy("a/b", "d").unwrap() && !bucket.copy("a/none", "d").unwrap());
    assert_eq!(fs::read(server.file("d")).unwrap(), b"other");
    bucket.remove("a/b").unwrap();
    bucket.remove("a/b").unwrap();
    assert_eq!(bucket.get("a/b").unwrap(), None);
}

#[test]
fn a_large_object_goes_in_pieces_and_comes_back_the_same() {
    let (server, mut bucket) = bucket();
    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..5 * PIECE_BYTES / 2).map(|n| (n % 251) as u8 ^ (n >> 13) as u8).collect();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, &content).unwrap();
    bucket.upload(&from, "large").unwrap();
    assert!(fs::read(server.file("large")).unwrap() == content);
    // As beyond the limit up to which a server copies by itself.
    bucket.copy_bytes = 1000;
    assert!(bucket.copy("large", "again").unwrap());
    bucket.put("small", b"small".to_vec()).unwrap();
    bucket.download(&["again", "small", "large"].map(str::to_owned), &to).unwrap();
    assert!(fs::read(&to).unwrap() == [&content[..], b"small", &content].concat());
    let error = bucket.download(&["none".to_owned()], &to).unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("s3://batches/none: cannot read"), "{error}");
}

#[test]
fn a_key_that_is_not_known_is_refused() {
    let server = Server::start("127.0.0.1:0");
    let mut address = address(&server, "k");
    address.credentials.as_mut().unwrap().secret = "guessed".into();
    let error = Bucket::open(&address).unwrap().get("k").unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::PermissionDenied, "{error}");
    assert!(!error.to_string().contains("guessed"));
}

#[test]
fn the_bucket_stands_in_front_of_the_host_where_it_is_asked_for() {
    assert_eq!(server("https://minio.example:9000", Some("b")).unwrap(), "https://b.minio.example:9000");
    assert_eq!(server("http://10.0.0.1", None).unwrap(), "http://10.0.0.1");
    for wrong in ["/x", "http://", "minio.example"] {
        let error = server(wrong, None).unwrap_err().to_string();
        assert!(error.contains("endpoint") && error.contains(wrong), "{error}");
    }
}

#[test]
fn records_are_shipped_in_whole_objects_of_bounded_length() {
    let (server, bucket) = bucket();
    let dir = tempfile::tempdir().unwrap();
    let mirror = Mirror::new(Arc::new(bucket), "out", "uid");
    assert!(mirror.begin("a").unwrap() && !mirror.begin("a").unwrap());
    let (path, mut file, mut written) = (dir.path().join("a.results"), Vec::new(), 0);
    let mut record = Vec::new();
    for round in 0..12u64 {
        for _ in 0..(round * 7 + 1) {
            let json = format!("\"{}\"", "x".repeat((written * 977 % 20_000) as usize));
            record::encode(
                &Head { line: written + 1, place: written, request: 1, failed: false },
                json.as_bytes(),
                &mut record,
            );
            file.extend_from_slice(&record);
            written += 1;
        }
        // The writer is in the middle of a record.
        fs::write(&path, [&file[..], b"torn"].concat()).unwrap();
        mirror.ship_records(&path).unwrap();
        fs::write(dir.path().join("other"), "").unwrap();

        let copy = tempfile::tempdir().unwrap();
        Mirror::new(Arc::new(Bucket::open(&address(&server, "k")).unwrap()), "out", "uid").fetch(copy.path()).unwrap();
        assert!(fs::read(copy.path().join("a.results")).unwrap() == file, "round {round}");
        assert!(copy.path().join("a.energy").exists());
    }
    let segments = fs::read_dir(server.file("out.parts/uid/a.results")).unwrap();
    let lengths: Vec<_> = segments.map(|one| one.unwrap().metadata().unwrap().len()).collect();
    let most = SEGMENT_BYTES + 21_000;
    assert!(lengths.len() as u64 <= file.len() as u64 / SEGMENT_BYTES + 1 && lengths.iter().all(|one| *one < most));
    let mut scan = Scan::new(BufReader::new(&file[..]));
    while scan.next_record().unwrap().is_some() {}
    assert_eq!(scan.offset(), file.len() as u64);
    // What comes after a gap does not count.
    fs::remove_file(server.file("out.parts/uid/a.results/000001")).unwrap();
    let copy = tempfile::tempdir().unwrap();
    Mirror::new(Arc::new(Bucket::open(&address(&server, "k")).unwrap()), "out", "uid").fetch(copy.path()).unwrap();
    let first = fs::metadata(server.file("out.parts/uid/a.results/000000")).unwrap().len();
    assert_eq!(fs::metadata(copy.path().join("a.results")).unwrap().len(), first);
}
