//! A bucket of an S3-compatible server, to programs that wait for each answer.
//!
//! Errors name the object as `s3://BUCKET/KEY`, in the shape of errors of files, so that whoever works on a copy on disk
//! need not know of buckets. Requests are repeated for up to a minute; each one's body is covered by its signature, so what
//! the server took is what was sent.

mod http;
pub mod mirror;

use crate::batch_file::file_error::{FileError, failed};
use ::http::Uri;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use joulecast_crds::names::bucket_variables;
use joulecast_crds::run_spec::BucketObject;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path as Key;
use object_store::{BackoffConfig, Error, ObjectStore, ObjectStoreExt, PutMode, RetryConfig, WriteMultipart};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

/// Longest time for which a request is repeated.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest pause before it is repeated.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Longest time in which no byte of an answer comes.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes of a piece of a large object, where so many pieces are enough; and pieces that are under way together.
const PIECE_BYTES: u64 = 8 << 20;
const PIECES: u64 = 9000;
const PIECES_UNDER_WAY: usize = 3;
/// Largest object that a server copies by itself, in bytes: the protocol's limit.
const COPY_BYTES: u64 = 5 << 30;
/// Objects that are read together.
const READS_UNDER_WAY: usize = 8;

/// What an access key is.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Access key id.
    pub id: String,
    /// Secret access key.
    pub secret: String,
    /// Token of a session, where the key is of one.
    pub token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing else of it may come into a log.
        f.debug_struct("Credentials").field("id", &self.id).finish_non_exhaustive()
    }
}

/// An object, and the key that opens its bucket; none for a bucket that is open to all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Which object.
    pub object: BucketObject,
    /// The key.
    pub credentials: Option<Credentials>,
}

/// The key of a bucket was to be in the environment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{bucket}: {variable} is not set: {field}.credentialsSecret has to name a Secret of the job's namespace with the keys \
     AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)]
pub struct NoCredentials {
    bucket: String,
    variable: String,
    field: &'static str,
}

/// What an object is to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// The requests.
    Input,
    /// The results.
    Output,
}

impl Address {
    /// An object with the key that the environment holds for this use.
    ///
    /// # Errors
    /// When the object needs one and there is none.
    pub fn of(
        object: BucketObject,
        what: Use,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, NoCredentials> {
        if !object.signed {
            return Ok(Self { object, credentials: None });
        }
        let (names, field) = match what {
            Use::Input => (bucket_variables::INPUT, "spec.input.s3"),
            Use::Output => (bucket_variables::OUTPUT, "spec.output.s3"),
        };
        let [id, secret, token] = names;
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let needed = |name: &str| {
            let missing = || NoCredentials { bucket: object.bucket.clone(), variable: name.to_owned(), field };
            given(name).ok_or_else(missing)
        };
        let credentials = Credentials { id: needed(id)?, secret: needed(secret)?, token: given(token) };
        Ok(Self { object, credentials: Some(credentials) })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.object.bucket, self.object.key)
    }
}

/// A bucket, ready to be used.
pub struct Bucket {
    name: String,
    store: AmazonS3,
    runtime: Runtime,
    copy_bytes: u64,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket").field("name", &self.name).finish_non_exhaustive()
    }
}

/// An object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// What changes when it is written anew.
    pub mark: String,
}

impl Bucket {
    /// The bucket of an object. Nothing is sent yet.
    ///
    /// # Errors
    /// When the address cannot be one, and when nothing says whom to trust.
    pub fn open(address: &Address) -> Result<Self, FileError> {
        let Address { object, credentials } = address;
        let BucketObject { bucket, key: _, region, endpoint, path_style, signed: _ } = object;
        let wrong = |error: Box<dyn std::error::Error + Send + Sync>| {
            failed("use the bucket", Path::new(&address.to_string()))(io::Error::new(
                io::ErrorKind::InvalidInput,
                error,
            ))
        };
        let http = endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        let connector = http::Connector::new(!http).map_err(|error| wrong(error.into()))?;
        let backoff = BackoffConfig { max_backoff: LONGEST_PAUSE, ..BackoffConfig::default() };
        let retry = RetryConfig { backoff, max_retries: usize::MAX, retry_timeout: PATIENCE };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(region)
            .with_virtual_hosted_style_request(!path_style)
            .with_allow_http(http)
            .with_retry(retry)
            .with_http_connector(connector);
        if let Some(endpoint) = endpoint {
            // The library wants the name inside of it where it is to stand in front of the host.
            let name = (!path_style).then_some(bucket.as_str());
            builder = builder.with_endpoint(server(endpoint, name).map_err(wrong)?);
        }
        builder = match credentials {
            None => builder.with_skip_signature(true),
            Some(Credentials { id, secret, token }) => {
                let builder = builder.with_access_key_id(id).with_secret_access_key(secret);
                match token {
                    Some(token) => builder.with_token(token),
                    None => builder,
                }
            }
        };
        let store = builder.build().map_err(|error| wrong(error.into()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("bucket")
            .enable_all()
            .build()
            .map_err(|error| wrong(error.into()))?;
        Ok(Self { name: bucket.clone(), store, runtime, copy_bytes: COPY_BYTES })
    }

    /// How people write an object of it.
    #[must_use]
    pub fn path(&self, key: &str) -> PathBuf {
        format!("s3://{}/{key}", self.name).into()
    }

    /// Does something with an object.
    fn with<T>(
        &self,
        doing: &'static str,
        key: &str,
        act: impl AsyncFnOnce(&AmazonS3, Key) -> object_store::Result<T>,
    ) -> Result<T, FileError> {
        let parsed = Key::parse(key).map_err(Error::from);
        let result = parsed.and_then(|key| self.runtime.block_on(act(&self.store, key)));
        result.map_err(|error| failed(doing, &self.path(key))(io_error(error)))
    }

    /// Writes a whole object.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn put(&self, key: &str, content: Vec<u8>) -> Result<(), FileError> {
        self.with("write", key, async |store, key| store.put(&key, content.into()).await.map(drop))
    }

    /// Writes an object unless there is one; says whether it did. When an answer is lost on the way, a repeated request
    /// finds the object of the first: whoever needs to know reads it.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn create(&self, key: &str, content: Vec<u8>) -> Result<bool, FileError> {
        self.with("create", key, async |store, key| {
            match store.put_opts(&key, content.into(), PutMode::Create.into()).await {
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(false),
                made => made.map(|_| true),
            }
        })
    }

    /// A small object; `None` if there is none.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn get(&self, key: &str) -> Result<Option<Bytes>, FileError> {
        self.with("read", key, async |store, key| match store.get(&key).await {
            Err(Error::NotFound { .. }) => Ok(None),
            found => found?.bytes().await.map(Some),
        })
    }

    /// Length of an object; `None` if there is none.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn length(&self, key: &str) -> Result<Option<u64>, FileError> {
        self.with("look at", key, async |store, key| match store.head(&key).await {
            Err(Error::NotFound { .. }) => Ok(None),
            found => found.map(|meta| Some(meta.size)),
        })
    }

    /// Copies objects one after the other into a file, however large they are.
    ///
    /// # Errors
    /// As the server and the system give them; the file is then of no use.
    pub fn download(&self, keys: &[String], to: &Path) -> Result<(), FileError> {
        let mut file = File::create(to).map_err(failed("create the file", to))?;
        let open = async |key: &String| {
            let place = Key::parse(key).map_err(Error::from)?;
            Ok(self.store.get(&place).await?.into_stream())
        };
        let named = |key: &str, error: Error| failed("read", &self.path(key))(io_error(error));
        self.runtime.block_on(async {
            // Asked for beforehand, since a great many small ones would take long one by one.
            let mut opened =
                futures::stream::iter(keys).map(async |key| (key, open(key).await)).buffered(READS_UNDER_WAY);
            while let Some((key, stream)) = opened.next().await {
                let mut stream = stream.map_err(|error| named(key, error))?;
                loop {
                    let next = tokio::time::timeout(SILENCE, stream.try_next()).await;
                    let next = next.map_err(|late| failed("read", &self.path(key))(late.into()))?;
                    let Some(bytes) = next.map_err(|error| named(key, error))? else { break };
                    file.write_all(&bytes).map_err(failed("write to", to))?;
                }
            }
            Ok(())
        })
    }

    /// Writes an object from a file, in pieces where it is large.
    ///
    /// # Errors
    /// As the server and the system give them; the object is then as it was before.
    pub fn upload(&self, from: &Path, key: &str) -> Result<(), FileError> {
        let mut file = File::open(from).map_err(failed("open", from))?;
        let bytes = file.metadata().map_err(failed("read", from))?.len();
        let piece = PIECE_BYTES.max(bytes.div_ceil(PIECES));
        let mut next = || {
            let mut buffer = Vec::new();
            let read = Read::by_ref(&mut file).take(piece).read_to_end(&mut buffer);
            read.map(|_| Bytes::from(buffer)).map_err(other)
        };
        self.with("write", key, async |store, key| {
            if bytes <= piece {
                return store.put(&key, next()?.into()).await.map(drop);
            }
            let pieces = futures::stream::iter(std::iter::from_fn(move || {
                Some(next()).filter(|next| !next.as_ref().is_ok_and(Bytes::is_empty))
            }));
            put_pieces(store, &key, piece, pieces).await
        })?;
        let there = self.length(key)?;
        if there != Some(bytes) {
            let text = format!("the object has {there:?} bytes after writing {bytes}");
            return Err(failed("write", &self.path(key))(io::Error::other(text)));
        }
        Ok(())
    }

    /// Copies an object to another key; says whether there was one. The server does it by itself up to its limit.
    ///
    /// # Errors
    /// As the server gives them; the other object is then as it was before.
    pub fn copy(&self, from: &str, to: &str) -> Result<bool, FileError> {
        let Some(bytes) = self.length(from)? else { return Ok(false) };
        let small = bytes <= self.copy_bytes;
        self.with("copy", from, async |store, from| {
            let to = Key::parse(to)?;
            let copied = if small {
                store.copy(&from, &to).await
            } else {
                let piece = PIECE_BYTES.max(bytes.div_ceil(PIECES));
                let stream = store.get(&from).await?.into_stream();
                put_pieces(store, &to, piece, stream).await
            };
            match copied {
                // Someone else has done it, and removed the original.
                Err(Error::NotFound { .. }) => Ok(false),
                copied => copied.map(|()| true),
            }
        })
    }

    /// The objects below a directory-like key, by key.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn list(&self, below: &str) -> Result<Vec<Listed>, FileError> {
        let mut found: Vec<Listed> = self.with("list", below, async |store, below| {
            let one = |meta: object_store::ObjectMeta| Listed {
                key: meta.location.to_string(),
                bytes: meta.size,
                mark: meta.e_tag.unwrap_or_else(|| meta.last_modified.to_string()),
            };
            store.list(Some(&below)).map_ok(one).try_collect().await
        })?;
        found.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        Ok(found)
    }

    /// Removes an object, if there is one.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn remove(&self, key: &str) -> Result<(), FileError> {
        self.with("remove", key, async |store, key| match store.delete(&key).await {
            Err(Error::NotFound { .. }) => Ok(()),
            removed => removed,
        })
    }
}

/// An object out of a stream, in pieces of this size, of which few are in memory.
async fn put_pieces(
    store: &AmazonS3,
    key: &Key,
    piece: u64,
    mut stream: impl futures::Stream<Item = object_store::Result<Bytes>> + Unpin,
) -> object_store::Result<()> {
    let upload = store.put_multipart(key).await?;
    let mut write = WriteMultipart::new_with_chunk_size(upload, usize::try_from(piece).unwrap_or(usize::MAX));
    loop {
        let next = match tokio::time::timeout(SILENCE, stream.try_next()).await {
            Ok(next) => next,
            Err(late) => Err(other(late.into())),
        };
        let taken = match next {
            Ok(Some(bytes)) => {
                write.put(bytes);
                write.wait_for_capacity(PIECES_UNDER_WAY).await
            }
            Ok(None) => return write.finish().await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            // Pieces that stay are what the bucket's rule for unfinished uploads removes.
            let _ = write.abort().await;
            return Err(error);
        }
    }
}

/// The endpoint, with the name of the bucket in front of the host if one is given.
fn server(endpoint: &str, bucket: Option<&str>) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let uri: Uri = endpoint.parse().map_err(|error| format!("endpoint {endpoint:?}: {error}"))?;
    let (Some(scheme), Some(host)) = (uri.scheme_str(), uri.authority()) else {
        return Err(format!("endpoint {endpoint:?}: give https://HOST[:PORT]").into());
    };
    let bucket = bucket.map_or_else(String::new, |bucket| format!("{bucket}."));
    Ok(format!("{scheme}://{bucket}{host}"))
}

fn other(error: io::Error) -> Error {
    Error::Generic { store: "S3", source: Box::new(error) }
}

/// With the kind that tells whether another try may help.
fn io_error(error: Error) -> io::Error {
    let kind = match &error {
        Error::NotFound { .. } => io::ErrorKind::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        Error::InvalidPath { .. } => io::ErrorKind::InvalidInput,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

/// The bucket of a copy on disk and the object, opened.
pub(crate) fn opened(address: &Address) -> Result<Arc<Bucket>, FileError> {
    Bucket::open(address).map(Arc::new)
}

#[cfg(test)]
#[path = "../tests/kills/bucket_server.rs"]
mod bucket_server;
#[cfg(test)]
mod tests;
