//! Records that survive a crash: one folder per object, one file per record.
//!
//! ```text
//! ROOT/OBJECT/RECORD.json      {"version": 1, "record": {...}}
//! ROOT/.quarantine/OBJECT/...  what could not be read, for a person to look at
//! ROOT/.removed/...            objects on their way out; emptied at open
//! ```
//!
//! A record is written to a temporary file, synced, renamed and its folder synced, so a reader finds
//! the old record or the new one and never half of one. A damaged record or one of an unknown version
//! is moved to the quarantine and reported; it is never deleted and never guessed at.
//!
//! All functions block; the amounts are a few kilobytes. Not here: what the records mean.

mod file;

use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Version of the record format that this program writes and reads.
pub const VERSION: u32 = 1;

const QUARANTINE: &str = ".quarantine";
const REMOVED: &str = ".removed";
const SUFFIX: &str = ".json";

/// A record could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A name that is no plain file name.
    #[error("{0:?} cannot name an object or a record")]
    Name(String),
    /// The file system refused.
    #[error("{step} {path}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The value cannot be written as JSON.
    #[error("encode record {0}")]
    Encode(String, #[source] serde_json::Error),
}

/// One object found by [`Store::scan`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Object {
    /// Records that are whole, by name; each is the JSON of the value that was put.
    pub records: BTreeMap<String, serde_json::Value>,
    /// Names of the records that were set aside, now or before.
    pub set_aside: Vec<String>,
}

impl Object {
    /// The record as a `T`; `None` when there is none, or it is not a `T` (and then it should be set aside).
    pub fn get<T: DeserializeOwned>(&self, record: &str) -> Option<Result<T, serde_json::Error>> {
        self.records.get(record).map(|value| serde_json::from_value(value.clone()))
    }
}

/// A folder of objects. Cheap to clone; one process may own a root at a time.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens or makes the store, and finishes removals that a crash interrupted.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let store = Self { root: root.into() };
        for folder in [store.root.clone(), store.root.join(QUARANTINE), store.root.join(REMOVED)] {
            file::create_dir(&folder)?;
        }
        for entry in file::list(&store.root.join(REMOVED))? {
            file::remove_dir(&store.root.join(REMOVED).join(entry))?;
        }
        Ok(store)
    }

    /// The object's folder, for files of the caller's own that live and die with it.
    pub fn folder(&self, object: &str) -> Result<PathBuf, StoreError> {
        Ok(self.root.join(plain(object)?))
    }

    /// Saves the record; on return it is on the disk.
    pub fn put<T: Serialize>(
        &self,
        object: &str,
        record: &str,
        value: &T,
    ) -> Result<(), StoreError> {
        let folder = self.folder(object)?;
        let path = folder.join(format!("{}{SUFFIX}", plain(record)?));
        let envelope = serde_json::json!({ "version": VERSION, "record": value });
        let bytes = serde_json::to_vec(&envelope)
            .map_err(|error| StoreError::Encode(record.to_owned(), error))?;
        if file::create_dir(&folder)? {
            file::sync_dir(&self.root)?;
        }
        file::replace(&path, &bytes)
    }

    /// Removes one record. OK when it is gone already.
    pub fn remove_record(&self, object: &str, record: &str) -> Result<(), StoreError> {
        let folder = self.folder(object)?;
        if file::remove(&folder.join(format!("{}{SUFFIX}", plain(record)?)))? {
            file::sync_dir(&folder)?;
        }
        Ok(())
    }

    /// Removes the object with everything in its folder. OK when it is gone already.
    ///
    /// The folder is renamed first: after a crash the object is there as a whole or not at all.
    pub fn remove(&self, object: &str) -> Result<(), StoreError> {
        let folder = self.folder(object)?;
        let removed = self.root.join(REMOVED).join(object);
        file::remove_dir(&removed)?;
        match fs::rename(&folder, &removed) {
            Ok(()) => file::sync_dir(&self.root)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => {
                return Err(StoreError::Io { step: "rename", path: folder, source });
            }
        }
        file::remove_dir(&removed)
    }

    /// Every object with its records. What cannot be read is set aside on the way.
    pub fn scan(&self) -> Result<BTreeMap<String, Object>, StoreError> {
        let mut objects = BTreeMap::new();
        for name in file::list(&self.root)? {
            if plain(&name).is_ok() && self.root.join(&name).is_dir() {
                let object = self.scan_object(&name)?;
                objects.insert(name, object);
            }
        }
        Ok(objects)
    }

    /// One object with its records, without any when there is no such object. What cannot be read is
    /// set aside on the way.
    pub fn read(&self, object: &str) -> Result<Object, StoreError> {
        if self.folder(object)?.is_dir() { self.scan_object(object) } else { Ok(Object::default()) }
    }

    /// Moves a record to the quarantine, where nothing reads it and nothing deletes it.
    pub fn set_aside(&self, object: &str, record: &str, why: &str) -> Result<(), StoreError> {
        let from = self.folder(object)?.join(format!("{}{SUFFIX}", plain(record)?));
        let folder = self.root.join(QUARANTINE).join(object);
        file::create_dir(&folder)?;
        let to = file::free_name(&folder, &format!("{record}{SUFFIX}"));
        tracing::error!(record = %from.display(), kept = %to.display(), why, "a record cannot be read and was set aside");
        match fs::rename(&from, &to) {
            Ok(()) => file::sync_dir(&folder),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(StoreError::Io { step: "set aside", path: from, source }),
        }
    }

    fn scan_object(&self, name: &str) -> Result<Object, StoreError> {
        let folder = self.root.join(name);
        let mut object = Object::default();
        for entry in file::list(&folder)? {
            if entry.ends_with(file::TEMPORARY) {
                file::remove(&folder.join(&entry))?;
            }
            let Some(record) = entry.strip_suffix(SUFFIX).filter(|record| plain(record).is_ok())
            else {
                continue;
            };
            match decode(&folder.join(&entry)) {
                Ok(value) => {
                    object.records.insert(record.to_owned(), value);
                }
                Err(why) => {
                    self.set_aside(name, record, &why)?;
                }
            }
        }
        for entry in file::list(&self.root.join(QUARANTINE).join(name))? {
            if let Some((record, _)) = entry.split_once(SUFFIX) {
                object.set_aside.push(record.to_owned());
            }
        }
        Ok(object)
    }
}

/// The record's value, or why it is none.
fn decode(path: &Path) -> Result<serde_json::Value, String> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Envelope {
        version: u32,
        record: serde_json::Value,
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let envelope: Envelope = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    if envelope.version == VERSION {
        Ok(envelope.record)
    } else {
        Err(format!("version {} is not {VERSION}", envelope.version))
    }
}

fn plain(name: &str) -> Result<&str, StoreError> {
    let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    if !name.is_empty() && !name.starts_with('.') && name.bytes().all(good) {
        Ok(name)
    } else {
        Err(StoreError::Name(name.to_owned()))
    }
}
