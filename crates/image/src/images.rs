//! The images of this node.

use crate::{
    Auth, Digest, ImageError, Limits, Reference,
    joins::Joins,
    layer::Folders,
    pull::Pull,
    records::{Record, Records},
};
use oci_spec::image::ImageConfiguration;
use rustix::fs::{FlockOperation, flock};
use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// How the store works.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// A `certs.d` tree; `None`: each registry under its own name.
    pub registry_config: Option<PathBuf>,
    /// Patience with registries.
    pub limits: Limits,
    /// Images, by reference, that nobody may collect, as the pause image is for others.
    pub pinned: Vec<String>,
}

/// One image.
#[derive(Debug, Clone)]
pub struct Image {
    /// `sha256:…`, the digest of its configuration.
    pub id: String,
    /// `HOST/REPOSITORY:TAG`; may be none.
    pub repo_tags: Vec<String>,
    /// `HOST/REPOSITORY@DIGEST`.
    pub repo_digests: Vec<String>,
    /// Bytes on this node.
    pub size: u64,
    /// Entry point, environment, user and the like.
    pub config: ImageConfiguration,
    /// EROFS file systems, lowest first.
    pub layers: Vec<PathBuf>,
    /// Nobody may collect it.
    pub pinned: bool,
}

/// What all images take up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// The store. One process owns a folder at a time.
#[derive(Debug)]
pub struct Images {
    pub(crate) root: PathBuf,
    pub(crate) folders: Folders,
    pub(crate) options: Options,
    pub(crate) joins: Joins,
    pub(crate) fetched: AtomicU64,
    state: Mutex<State>,
    _lock: fs::File,
}

#[derive(Debug)]
struct State {
    records: Records,
    /// Layers that pulls in progress count on, with how many do.
    wanted: HashMap<String, usize>,
}

impl Images {
    /// Opens or makes the store in `root`, and removes what a crash left half done.
    pub fn open(root: &Path, options: Options) -> Result<Self, ImageError> {
        let folders = Folders { layers: root.join("layers"), temporary: root.join("temporary") };
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| ImageError::io("create", path, error)
        };
        fs::create_dir_all(root).map_err(failed(root))?;
        let lock_file = root.join("lock");
        let lock = fs::File::create(&lock_file).map_err(failed(&lock_file))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| ImageError::InUse(root.to_owned()))?;
        match fs::remove_dir_all(&folders.temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(ImageError::io("empty", &folders.temporary, error));
            }
            _ => {}
        }
        for folder in [&folders.layers, &folders.temporary] {
            fs::create_dir_all(folder).map_err(failed(folder))?;
        }
        let whole =
            |record: &Record| record.layers.iter().all(|layer| folders.file(layer).is_file());
        let records = Records::open(&root.join("records"), whole)?;
        let images = Self {
            root: root.to_owned(),
            state: Mutex::new(State { records, wanted: HashMap::new() }),
            joins: Joins::default(),
            fetched: AtomicU64::new(0),
            folders,
            options,
            _lock: lock,
        };
        images.collect(&mut images.state())?;
        Ok(images)
    }

    /// Fetches what is not there yet of the image. Dropped before its end, it leaves nothing but whole
    /// layers, which the next pull uses and the next removal of anything collects.
    pub async fn pull(
        self: &Arc<Self>,
        name: &str,
        auth: Option<&Auth>,
    ) -> Result<Image, ImageError> {
        let reference = Reference::parse(name)?;
        let record = Pull::new(self, &reference, auth)?.run().await?;
        self.image(&record)
    }

    /// Bytes of layers that came from registries since the store was opened.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// All images, in the order of their ids.
    pub fn list(&self) -> Vec<Image> {
        self.state().records.all().filter_map(|record| self.image(record).ok()).collect()
    }

    /// The image with this tag, digest, id or beginning of an id.
    pub fn resolve(&self, name: &str) -> Option<Image> {
        self.state().records.resolve(name).and_then(|record| self.image(record).ok())
    }

    /// Removes an image with all its names. OK when there is none. Containers keep what they run on.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let mut state = self.state();
        let Some(id) = state.records.resolve(name).map(|record| record.id.clone()) else {
            return Ok(());
        };
        state.records.remove(&id)?;
        self.collect(&mut state)
    }

    /// What all images take up, from the file system.
    pub fn usage(&self) -> Result<Usage, ImageError> {
        let mut usage = Usage::default();
        measure(&self.root, &mut usage)
            .map_err(|error| ImageError::io("measure", &self.root, error))?;
        Ok(usage)
    }

    fn image(&self, record: &Record) -> Result<Image, ImageError> {
        let config = record.config().map_err(|error| ImageError::NotAnImage {
            image: record.id.to_string(),
            what: "the configuration".to_owned(),
            why: error.to_string(),
        })?;
        let pinned = self.options.pinned.iter().filter_map(|name| Reference::parse(name).ok());
        Ok(Image {
            id: record.id.to_string(),
            repo_tags: record.tags.iter().cloned().collect(),
            repo_digests: record.digests.iter().cloned().collect(),
            size: record.size,
            config,
            layers: record.layers.iter().map(|layer| self.folders.file(layer)).collect(),
            pinned: pinned.map(|name| name.to_string()).any(|name| record.tags.contains(&name)),
        })
    }

    /// The record of a registry's document, if the image is here.
    pub(crate) fn known(&self, root: &Digest) -> Option<Record> {
        self.state().records.by_root(root).cloned()
    }

    /// Saves an image, with the names it has already.
    pub(crate) fn save(&self, mut record: Record) -> Result<Record, ImageError> {
        let mut state = self.state();
        if let Some(known) = state.records.get(&record.id) {
            record.tags.extend(known.tags.iter().cloned());
            record.digests.extend(known.digests.iter().cloned());
        }
        state.records.put(record.clone())?;
        Ok(record)
    }

    /// Keeps a layer from being collected, there or not, until the value is dropped.
    pub(crate) fn want(self: &Arc<Self>, layer: &str) -> Wanted {
        *self.state().wanted.entry(layer.to_owned()).or_default() += 1;
        Wanted { images: self.clone(), layer: layer.to_owned() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes layers that no image has and no pull counts on.
    fn collect(&self, state: &mut State) -> Result<(), ImageError> {
        let used: BTreeSet<_> = state.records.all().flat_map(|record| &record.layers).collect();
        for layer in self.folders.list()? {
            if !used.contains(&layer) && !state.wanted.contains_key(&layer) {
                self.folders.remove(&layer)?;
            }
        }
        Ok(())
    }
}

/// A layer somebody counts on.
pub(crate) struct Wanted {
    images: Arc<Images>,
    layer: String,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        let mut state = self.images.state();
        if let Some(users) = state.wanted.get_mut(&self.layer) {
            *users -= 1;
            if *users == 0 {
                state.wanted.remove(&self.layer);
            }
        }
    }
}

/// Adds up a folder. What goes away meanwhile counts for nothing.
fn measure(folder: &Path, usage: &mut Usage) -> io::Result<()> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let entries = match fs::read_dir(folder) {
        Err(error) if gone(&error) => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let data = match entry.metadata() {
            Err(error) if gone(&error) => continue,
            data => data?,
        };
        usage.bytes += data.blocks() * 512;
        usage.inodes += 1;
        if data.is_dir() {
            measure(&entry.path(), usage)?;
        }
    }
    Ok(())
}
