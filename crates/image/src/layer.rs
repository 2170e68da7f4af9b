//! One layer: fetched, verified, unpacked and packed as EROFS, all while its bytes arrive.
//!
//! ```text
//! registry -> Download -> channel -> hash -> gzip/zstd -> hash -> unpack -> mkfs.erofs -> layers/
//! ```
//!
//! The first hash is the manifest's digest of the archive, the second the configuration's diff id. A file
//! under `layers/` is whole: it is renamed there when both were right and it is on the disk.

use crate::{
    Digest, ImageError, RegistryError,
    digest::HashingReader,
    download::Download,
    erofs,
    manifest::{Descriptor, Packing},
    registry::Repository,
    unpack::{Summary, UnpackError, unpack},
};
use bytes::Bytes;
use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};
use tokio::{sync::mpsc, task::spawn_blocking};

/// Chunks of an archive on their way between the network and the disk.
const CHUNKS: usize = 32;
/// A frame of zstd may ask for a window of so many bytes (a power of two), as containerd allows.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Where layers are kept, and where they are made.
#[derive(Debug, Clone)]
pub(crate) struct Folders {
    pub layers: PathBuf,
    pub temporary: PathBuf,
}

impl Folders {
    /// The layer's file system.
    pub fn file(&self, name: &str) -> PathBuf {
        self.layers.join(format!("{name}.erofs"))
    }

    fn summary(&self, name: &str) -> PathBuf {
        self.layers.join(format!("{name}.json"))
    }

    /// What a layer says about folders; `None` when the layer is not there.
    pub fn read(&self, name: &str) -> Option<Summary> {
        if !self.file(name).is_file() {
            return None;
        }
        serde_json::from_slice(&fs::read(self.summary(name)).ok()?).ok()
    }

    /// Removes the layer. OK when it is not there.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        for file in [self.summary(name), self.file(name)] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(ImageError::io("remove", file, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Names of all layers there.
    pub fn list(&self) -> Result<Vec<String>, ImageError> {
        let failed = |error| ImageError::io("list", &self.layers, error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.layers).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// A folder to work in, removed with the value.
    pub fn workplace(&self) -> Result<tempfile::TempDir, ImageError> {
        tempfile::tempdir_in(&self.temporary)
            .map_err(|error| ImageError::io("create", &self.temporary, error))
    }

    /// Packs a folder and puts it among the layers.
    pub async fn keep(
        &self,
        name: &str,
        work: &tempfile::TempDir,
        tree: &Path,
        summary: &Summary,
    ) -> Result<(), KeepError> {
        let (blob, about) = (work.path().join("layer.erofs"), work.path().join("layer.json"));
        erofs::pack(tree, &blob).await.map_err(KeepError::Pack)?;
        let text =
            serde_json::to_vec(summary).map_err(|error| KeepError::Pack(error.to_string()))?;
        let moves = [(about.clone(), self.summary(name)), (blob, self.file(name))];
        let layers = self.layers.clone();
        let keep = move || -> Result<(), (PathBuf, io::Error)> {
            fs::write(&about, text).map_err(|error| (about, error))?;
            for (from, to) in moves {
                let sync = || fs::File::open(&from)?.sync_all();
                sync().map_err(|error| (from.clone(), error))?;
                fs::rename(&from, &to).map_err(|error| (to, error))?;
            }
            let sync = || fs::File::open(&layers)?.sync_all();
            sync().map_err(|error| (layers.clone(), error))
        };
        match spawn_blocking(keep).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err((path, error))) => Err(KeepError::Io(ImageError::io("write", path, error))),
            Err(error) => Err(KeepError::Pack(error.to_string())),
        }
    }
}

/// A layer could not be put among the others.
pub(crate) enum KeepError {
    Pack(String),
    Io(ImageError),
}

/// A layer to fetch.
pub(crate) struct Fetch<'a> {
    pub image: &'a str,
    pub repository: &'a Repository,
    pub archive: &'a Descriptor,
    pub diff_id: &'a Digest,
    pub packing: Packing,
    pub folders: &'a Folders,
}

impl Fetch<'_> {
    /// Fetches the layer from any host that has it right.
    pub async fn run(&self) -> Result<Summary, ImageError> {
        let mut liars = Vec::new();
        loop {
            let work = self.folders.workplace()?;
            let tree = work.path().join("tree");
            fs::create_dir(&tree).map_err(|error| ImageError::io("create", &tree, error))?;
            let mut download =
                Download::new(self.repository, &self.archive.digest, self.archive.size, &liars);
            let unpacked = self.unpack(&mut download, &tree).await?;
            if unpacked.archive != self.archive.digest {
                tracing::warn!(archive = %self.archive.digest, got = %unpacked.archive, "a registry sent other bytes");
                // Asking for more without these hosts fails with what each of them did.
                liars.extend_from_slice(download.sources());
                continue;
            }
            let summary = unpacked.result.map_err(|error| self.damaged(error))?;
            let diff_id = unpacked.content;
            if diff_id != *self.diff_id {
                return Err(self.corrupt(format!(
                    "it unpacks to {diff_id}, the configuration says {}",
                    self.diff_id
                )));
            }
            let kept = self.folders.keep(self.diff_id.hex(), &work, &tree, &summary).await;
            return match kept {
                Ok(()) => Ok(summary),
                Err(KeepError::Io(error)) => Err(error),
                Err(KeepError::Pack(why)) => Err(ImageError::Erofs {
                    image: self.image.to_owned(),
                    layer: self.diff_id.clone(),
                    why,
                }),
            };
        }
    }

    async fn unpack(
        &self,
        download: &mut Download<'_>,
        tree: &Path,
    ) -> Result<Unpacked, ImageError> {
        let (sender, receiver) = mpsc::channel(CHUNKS);
        let job = Job {
            archive: self.archive.digest.clone(),
            diff_id: self.diff_id.clone(),
            packing: self.packing,
            tree: tree.to_owned(),
        };
        let worker = spawn_blocking(move || job.run(Chunks { receiver, current: Bytes::new() }));
        let failed = |source| ImageError::Registry {
            image: self.image.to_owned(),
            step: format!("layer {}", self.archive.digest),
            source,
        };
        // The worker takes all there is, whatever it thinks of it, so that the digest can be judged first.
        let sent = send(download, sender).await.map_err(failed);
        let unpacked = worker.await;
        sent?;
        unpacked.map_err(|_| ImageError::Cancelled { image: self.image.to_owned() })
    }

    fn damaged(&self, error: UnpackError) -> ImageError {
        match error {
            UnpackError::Archive(error) => self.corrupt(crate::error::chain(&error)),
            UnpackError::Io { step, path, source } => ImageError::io(
                step,
                format!("{} in layer {}", path.display(), self.diff_id),
                source,
            ),
        }
    }

    fn corrupt(&self, why: String) -> ImageError {
        ImageError::Corrupt {
            image: self.image.to_owned(),
            what: format!("layer {}", self.archive.digest),
            why,
        }
    }
}

/// Hands out all bytes of a download.
async fn send(
    download: &mut Download<'_>,
    sender: mpsc::Sender<Bytes>,
) -> Result<(), RegistryError> {
    while let Some(bytes) = download.next().await? {
        if sender.send(bytes).await.is_err() {
            break;
        }
    }
    Ok(())
}

struct Unpacked {
    /// Digests of what came, packed and not.
    archive: Digest,
    content: Digest,
    result: Result<Summary, UnpackError>,
}

struct Job {
    archive: Digest,
    diff_id: Digest,
    packing: Packing,
    tree: PathBuf,
}

impl Job {
    fn run(self, chunks: Chunks) -> Unpacked {
        let mut archive = HashingReader::new(chunks, &self.archive);
        let (result, content) = match self.packing {
            Packing::Plain => self.unpack(&mut archive),
            Packing::Gzip => self.unpack(flate2::read::MultiGzDecoder::new(&mut archive)),
            Packing::Zstd => match zstd(&mut archive) {
                Ok(decoder) => self.unpack(decoder),
                Err(error) => (Err(UnpackError::Archive(error.into())), Digest::of(b"")),
            },
        };
        // What follows the packed data belongs to the archive's digest.
        io::copy(&mut archive, &mut io::sink()).ok();
        Unpacked { archive: archive.finish().0, content, result }
    }

    fn unpack(&self, content: impl Read) -> (Result<Summary, UnpackError>, Digest) {
        let mut content = HashingReader::new(content, &self.diff_id);
        let result = unpack(&mut content, &self.tree);
        // What follows the archive's end belongs to the diff id.
        let rest = io::copy(&mut content, &mut io::sink());
        let result = match (result, rest) {
            (Ok(_), Err(error)) => Err(UnpackError::Archive(error.into())),
            (result, _) => result,
        };
        (result, content.finish().0)
    }
}

fn zstd<R: Read>(reader: R) -> io::Result<impl Read> {
    let mut decoder = zstd::Decoder::new(reader)?;
    decoder.window_log_max(ZSTD_WINDOW_LOG)?;
    Ok(decoder)
}

/// The chunks as a reader, for the thread that unpacks.
struct Chunks {
    receiver: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(bytes) => self.current = bytes,
                None => return Ok(0),
            }
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}
