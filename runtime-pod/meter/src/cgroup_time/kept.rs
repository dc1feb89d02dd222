//! Files of cgroups that are read ten times a second: each is opened once and then read from its start again, which a file of
//! the kernel answers with what it holds now. Finding the file costs more than reading it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Open files, one for each cgroup, by its name.
#[derive(Debug, Default)]
pub(super) struct KeptFiles {
    files: BTreeMap<String, File>,
    text: Vec<u8>,
}

impl KeptFiles {
    /// What a file of a cgroup holds now; `None` if it cannot be read. A file of a cgroup that is gone cannot be read any more,
    /// and is looked for anew.
    pub(super) fn read(&mut self, name: &str, dir: &Path, file: &str) -> Option<&str> {
        let known = self.files.get(name).is_some_and(|file| fill(&mut self.text, file).is_ok());
        if !known {
            self.files.remove(name);
            let file = File::open(dir.join(file)).ok()?;
            fill(&mut self.text, &file).ok()?;
            self.files.insert(name.to_owned(), file);
        }
        std::str::from_utf8(&self.text).ok()
    }

    /// Closes the files of all other cgroups.
    pub(super) fn retain(&mut self, wanted: impl Fn(&String) -> bool) {
        self.files.retain(|name, _| wanted(name));
    }
}

/// Reads a whole file from its start. The kernel gives as much of such a file as there is room for: where room is left, it
/// is at its end.
fn fill(text: &mut Vec<u8>, file: &File) -> io::Result<()> {
    const ROOM: usize = 4096;
    let mut length = 0;
    loop {
        text.resize((length + ROOM).max(text.capacity()), 0);
        let room = text.len() - length;
        let more = file.read_at(&mut text[length..], length as u64)?;
        length += more;
        if more < room {
            text.truncate(length);
            return Ok(());
        }
    }
}
