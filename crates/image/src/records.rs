//! What is known about each image, on disk and in memory.
//!
//! One record per image id. A name (tag) means one image at a time: given to another, it leaves the first,
//! which stays, without that name, until it is removed.

use crate::{Digest, ImageError, Reference};
use a3s_box_store::Store;
use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

const RECORD: &str = "image";
/// Shorter beginnings of an id are no name of an image.
const SHORTEST_ID: usize = 4;

/// One image.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// The configuration's digest.
    pub id: Digest,
    /// `HOST/REPOSITORY:TAG`.
    pub tags: BTreeSet<String>,
    /// `HOST/REPOSITORY@DIGEST`.
    pub digests: BTreeSet<String>,
    /// The configuration's text, as its digest has it.
    pub config: String,
    /// Files of the layers below `layers/`, lowest first, without their suffix.
    pub layers: Vec<String>,
    /// Bytes of all layers and of the configuration.
    pub size: u64,
}

impl Record {
    /// The configuration.
    pub fn config(&self) -> Result<ImageConfiguration, serde_json::Error> {
        serde_json::from_str(&self.config)
    }

    /// Gives it one more name.
    pub fn name(&mut self, reference: &Reference, root: &Digest) {
        if reference.tag().is_some() {
            self.tags.insert(reference.to_string());
        }
        self.digests.insert(reference.with_digest(root.clone()).to_string());
    }
}

/// All images.
#[derive(Debug)]
pub(crate) struct Records {
    store: Store,
    images: BTreeMap<Digest, Record>,
}

impl Records {
    /// Reads all records; `whole` says whether an image's layers are all there. One that is not is dropped:
    /// it is pulled again when it is needed.
    pub fn open(root: &Path, whole: impl Fn(&Record) -> bool) -> Result<Self, ImageError> {
        let store = Store::open(root)?;
        let mut images = BTreeMap::new();
        for (name, object) in store.scan()? {
            let Some(record) = object.get::<Record>(RECORD) else { continue };
            match record {
                Ok(record) if record.config().is_ok() && whole(&record) => {
                    images.insert(record.id.clone(), record);
                }
                Ok(record) => {
                    tracing::warn!(id = %record.id, "an image lacks layers and is forgotten");
                    store.remove(&name)?;
                }
                Err(error) => store.set_aside(&name, RECORD, &error.to_string())?,
            }
        }
        Ok(Self { store, images })
    }

    pub fn all(&self) -> impl Iterator<Item = &Record> {
        self.images.values()
    }

    /// The image with this id.
    pub fn get(&self, id: &Digest) -> Option<&Record> {
        self.images.get(id)
    }

    /// The image that the registry's document of this digest describes.
    pub fn by_root(&self, root: &Digest) -> Option<&Record> {
        let suffix = format!("@{root}");
        self.all().find(|record| record.digests.iter().any(|digest| digest.ends_with(&suffix)))
    }

    /// By tag, digest, id, or the beginning of an id that no other image's has.
    pub fn resolve(&self, name: &str) -> Option<&Record> {
        let named = Reference::parse(name).ok().and_then(|reference| {
            let name = reference.to_string();
            self.all().find(|record| record.tags.contains(&name) || record.digests.contains(&name))
        });
        named.or_else(|| self.by_id(name))
    }

    fn by_id(&self, text: &str) -> Option<&Record> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.len() < SHORTEST_ID {
            return None;
        }
        let mut found = self.all().filter(|record| record.id.hex().starts_with(hex));
        found.next().filter(|_| found.next().is_none())
    }

    /// Saves an image; its tags leave all others.
    pub fn put(&mut self, record: Record) -> Result<(), ImageError> {
        self.save(&record)?;
        let others: Vec<_> = self
            .all()
            .filter(|other| other.id != record.id && !other.tags.is_disjoint(&record.tags))
            .cloned()
            .collect();
        for mut other in others {
            other.tags.retain(|tag| !record.tags.contains(tag));
            self.save(&other)?;
            self.images.insert(other.id.clone(), other);
        }
        self.images.insert(record.id.clone(), record);
        Ok(())
    }

    fn save(&self, record: &Record) -> Result<(), ImageError> {
        Ok(self.store.put(record.id.hex(), RECORD, record)?)
    }

    /// Removes an image with all its names.
    pub fn remove(&mut self, id: &Digest) -> Result<(), ImageError> {
        self.store.remove(id.hex())?;
        self.images.remove(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str =
        r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;

    fn record(text: &str, tags: &[&str]) -> Record {
        let id = Digest::of(text.as_bytes());
        let mut record = Record {
            id: id.clone(),
            tags: BTreeSet::new(),
            digests: BTreeSet::new(),
            config: CONFIG.to_owned(),
            layers: Vec::new(),
            size: 1,
        };
        for tag in tags {
            record.name(&Reference::parse(tag).unwrap(), &id);
        }
        record
    }

    #[test]
    fn an_image_is_found_by_all_its_names_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Records::open(folder.path(), |_| true).unwrap();
        let image = record("a", &["busybox", "registry.k8s.io/pause:3.10"]);
        records.put(image.clone()).unwrap();
        records.put(record("b", &["other"])).unwrap();
        let id = image.id.to_string();
        for name in [
            "busybox",
            "busybox:latest",
            "docker.io/library/busybox",
            "registry.k8s.io/pause:3.10",
            &format!("busybox@{}", image.id),
            &format!("busybox:1.2@{}", image.id),
            &id,
            image.id.hex(),
            &image.id.hex()[..12],
        ] {
            assert_eq!(records.resolve(name).map(|record| &record.id), Some(&image.id), "{name}");
        }
        for name in [
            "busybox:1",
            "registry.k8s.io/busybox",
            "",
            "sha256:",
            "sha256:0",
            &format!("none@{id}"),
        ] {
            assert!(records.resolve(name).is_none(), "{name}");
        }
    }

    #[test]
    fn a_tag_means_one_image_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Records::open(folder.path(), |_| true).unwrap();
        let (old, new) = (record("old", &["app", "app:1"]), record("new", &["app"]));
        records.put(old.clone()).unwrap();
        records.put(new.clone()).unwrap();
        drop(records);
        let mut records = Records::open(folder.path(), |_| true).unwrap();
        assert_eq!(records.resolve("app").unwrap().id, new.id);
        assert_eq!(records.resolve("app:1").unwrap().id, old.id);
        assert_eq!(records.resolve(old.id.hex()).unwrap().tags.len(), 1);
        records.remove(&old.id).unwrap();
        assert!(records.resolve("app:1").is_none());
        drop(records);
        let records = Records::open(folder.path(), |_| false).unwrap();
        assert_eq!(records.all().count(), 0);
    }
}
