//! The finished output where it is an object.
//!
//! The output is written on disk and then as an object of the attempt's own. Whoever creates `merged/finished.json`, which is
//! possible once, has finished: it names that object. From there the object is copied to its place, by the same attempt or,
//! if that dies in between, by the next; and when the copy is there the original goes, so that it is made only once.

use super::{ABOUT, Finished, MERGED, MERGING, OUTPUT, OutputError};
use crate::batch_file::parts::Attempt;
use crate::bucket::mirror::{self, Mirror};
use crate::fail_point;
use std::path::Path;

fn about() -> String {
    format!("{MERGED}/{ABOUT}")
}

fn staged(attempt: &str) -> String {
    format!("{MERGING}{attempt}/{OUTPUT}")
}

/// The finished output, if there is one; it is put in its place if that was left undone.
pub(super) fn finished(mirror: &Mirror) -> Result<Option<Finished>, OutputError> {
    let Some(text) = mirror.get(&about())? else { return Ok(None) };
    let path = mirror.path(&about());
    let finished: Finished =
        serde_json::from_slice(&text).map_err(|source| OutputError::Description { path, source })?;
    fail_point!("output-rename");
    mirror.publish(&staged(&finished.attempt))?;
    fail_point!("output-renamed");
    mirror.clean(|name| mirror::is_results(name) || name.starts_with(MERGING))?;
    Ok(Some(finished))
}

/// Makes the output in a directory the finished one, unless there is another: then that one stands.
pub(super) fn finish(mirror: &Mirror, attempt: &Attempt, ours: &Finished, dir: &Path) -> Result<Finished, OutputError> {
    fail_point!("upload");
    let staged = staged(&attempt.to_string());
    mirror.upload(&dir.join(OUTPUT), &staged)?;
    fail_point!("merged-rename");
    let text =
        serde_json::to_vec(ours).map_err(|source| OutputError::Description { path: mirror.path(&about()), source })?;
    // Whether it was ours or another that was there is what it says itself.
    mirror.create(&about(), text)?;
    let finished = finished(mirror)?.ok_or_else(|| {
        let gone = std::io::Error::from(std::io::ErrorKind::NotFound);
        OutputError::from(crate::batch_file::file_error::failed("read", &mirror.path(&about()))(gone))
    })?;
    if finished.attempt != ours.attempt {
        tracing::warn!(by = finished.attempt, "another attempt has finished the output; it stands as it is");
    }
    Ok(finished)
}
