//! Where the shared libraries of engines are looked for.
//!
//! In this order: the file that a variable names; the directory of this program; `../lib/joulecast` beside that directory,
//! where the images have them. The first that is there is opened; nothing is ever fetched.

use std::path::{Path, PathBuf};

/// A library that is opened at run time.
pub(super) struct Wanted {
    /// Its name to people.
    pub(super) product: &'static str,
    /// Variable that names its file.
    pub(super) variable: &'static str,
    /// Its file.
    pub(super) file: &'static str,
    /// What to do where it is missing.
    pub(super) way_out: &'static str,
}

impl Wanted {
    /// The library's file, or where it was looked for.
    pub(super) fn find(&self) -> Result<PathBuf, String> {
        let named = std::env::var_os(self.variable).filter(|v| !v.is_empty()).map(PathBuf::from);
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        self.find_for(named, &program)
    }

    /// The same for a process whose program is `program`.
    fn find_for(&self, named: Option<PathBuf>, program: &Path) -> Result<PathBuf, String> {
        let Self { product, variable, file, way_out } = self;
        if let Some(path) = named {
            return match path.is_file() {
                true => Ok(path),
                false => Err(format!("{product}: {variable} is {}, where there is no file; {way_out}", path.display())),
            };
        }
        let beside = program.parent().unwrap_or(Path::new("/"));
        let places = [beside.join(file), beside.join("../lib/joulecast").join(file)];
        match places.iter().find(|path| path.is_file()) {
            Some(path) => Ok(path.clone()),
            None => Err(format!(
                "{product}: no {file} (looked for {} and {}; {variable} is not set); {way_out}",
                places[0].display(),
                places[1].display()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_takes_the_first_place_and_names_all_where_there_is_none() {
        let wanted =
            Wanted { product: "Thing", variable: "THING_PATH", file: "libthing.so", way_out: "run `make thing`" };
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("usr/bin/program");
        let image = dir.path().join("usr/lib/joulecast");
        std::fs::create_dir_all(program.parent().unwrap()).unwrap();
        std::fs::create_dir_all(&image).unwrap();

        let error = wanted.find_for(None, &program).unwrap_err();
        for part in ["Thing", "usr/bin/libthing.so", "lib/joulecast", "THING_PATH", "make thing"] {
            assert!(error.contains(part), "{error}");
        }

        std::fs::write(image.join(wanted.file), "").unwrap();
        let found = wanted.find_for(None, &program).unwrap();
        assert_eq!(found.canonicalize().unwrap(), image.join(wanted.file).canonicalize().unwrap());

        let beside = program.with_file_name(wanted.file);
        std::fs::write(&beside, "").unwrap();
        assert_eq!(wanted.find_for(None, &program).unwrap(), beside);

        let named = dir.path().join("other.so");
        let error = wanted.find_for(Some(named.clone()), &program).unwrap_err();
        assert!(error.contains("THING_PATH") && error.contains("other.so"), "{error}");
        std::fs::write(&named, "").unwrap();
        assert_eq!(wanted.find_for(Some(named.clone()), &program).unwrap(), named);
    }
}
