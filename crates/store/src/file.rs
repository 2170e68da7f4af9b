//! The few file operations of the store, each with its path in the error.

use crate::StoreError;
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Suffix of files that were being written when the program died.
pub const TEMPORARY: &str = ".tmp";

fn at<'a>(step: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { step, path: path.to_owned(), source }
}

/// Writes the file so that a crash leaves the old content or the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(TEMPORARY);
    let temporary = PathBuf::from(name);
    let mut file = File::create(&temporary).map_err(at("create", &temporary))?;
    file.write_all(bytes).map_err(at("write", &temporary))?;
    file.sync_all().map_err(at("sync", &temporary))?;
    fs::rename(&temporary, path).map_err(at("rename to", path))?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Makes a rename or removal in the folder durable.
pub fn sync_dir(folder: &Path) -> Result<(), StoreError> {
    File::open(folder).and_then(|dir| dir.sync_all()).map_err(at("sync", folder))
}

/// Makes the folder, private to root; whether it was missing.
pub fn create_dir(folder: &Path) -> Result<bool, StoreError> {
    use std::os::unix::fs::DirBuilderExt;
    if folder.is_dir() {
        return Ok(false);
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(at("create", folder))?;
    Ok(true)
}

/// Removes the file; whether it was there.
pub fn remove(path: &Path) -> Result<bool, StoreError> {
    absent_is_false(fs::remove_file(path), "remove", path)
}

/// Removes the folder and all in it. OK when it is gone already.
pub fn remove_dir(path: &Path) -> Result<(), StoreError> {
    absent_is_false(fs::remove_dir_all(path), "remove", path).map(drop)
}

/// Names in the folder, sorted; none when there is no such folder. Names that are not UTF-8 are not ours.
pub fn list(folder: &Path) -> Result<Vec<String>, StoreError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(at("list", folder)(source)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(at("list", folder))?.file_name();
        names.extend(name.into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// `name` in the folder, with a number after it when that is taken.
pub fn free_name(folder: &Path, name: &str) -> PathBuf {
    let plain = folder.join(name);
    if !plain.exists() {
        return plain;
    }
    (1u32..)
        .map(|n| folder.join(format!("{name}.{n}")))
        .find(|path| !path.exists())
        .unwrap_or(plain)
}

fn absent_is_false(
    result: io::Result<()>,
    step: &'static str,
    path: &Path,
) -> Result<bool, StoreError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(at(step, path)(source)),
    }
}
