//! A pull, from a name to a record.

use crate::{
    Auth, Digest, ImageError, Images, Reference,
    images::Wanted,
    layer::{Fetch, KeepError},
    manifest::{Descriptor, Document, Manifest, Packing, Platform, choose},
    parents::{self, Parents},
    records::Record,
    registry::{Repository, Target},
    unpack::Summary,
};
use futures::{StreamExt, TryStreamExt, stream};
use oci_spec::image::ImageConfiguration;
use std::{
    collections::BTreeSet,
    fs,
    sync::{Arc, atomic::Ordering},
};
use tokio::task::spawn_blocking;

/// Larger documents are no descriptions of images (containerd has the same limit).
const LARGEST_DOCUMENT: usize = 8 << 20;
/// Layers of one image at a time.
const AT_A_TIME: usize = 3;
/// Overlay takes more, but nobody has them.
const MOST_LAYERS: usize = 500;
/// An index may name another index; a circle is impossible, a long way is not.
const MOST_INDEXES: usize = 3;

pub(crate) struct Pull<'a> {
    images: &'a Arc<Images>,
    reference: &'a Reference,
    name: String,
    repository: Repository,
    platform: Platform,
}

/// A configuration that fits its manifest.
struct Config {
    digest: Digest,
    text: String,
    /// Lowest first, as many as the manifest has layers.
    diff_ids: Vec<Digest>,
}

impl<'a> Pull<'a> {
    pub fn new(
        images: &'a Arc<Images>,
        reference: &'a Reference,
        auth: Option<&Auth>,
    ) -> Result<Self, ImageError> {
        let options = &images.options;
        let repository =
            Repository::new(reference, options.registry_config.as_deref(), auth, &options.limits)?;
        Ok(Self {
            images,
            reference,
            name: reference.to_string(),
            repository,
            platform: Platform::own(),
        })
    }

    pub async fn run(&self) -> Result<Record, ImageError> {
        let (root, document) = self.root().await?;
        if let Some(mut record) = self.images.known(&root) {
            record.name(self.reference, &root);
            return self.images.save(record);
        }
        let document = match document {
            Some(bytes) => bytes,
            None => self.document("manifest", &Target::Manifest(&root)).await?,
        };
        let manifest = self.manifest(root.clone(), document).await?;
        let config = self.config(&manifest).await?;
        // Until the record is there, a removal must not take what was fetched.
        let wanted: Vec<Wanted> =
            config.diff_ids.iter().map(|id| self.images.want(id.hex())).collect();
        let archives = manifest.layers.iter().zip(&config.diff_ids);
        let layers: Vec<_> =
            archives.map(|(archive, diff_id)| self.layer(archive, diff_id)).collect();
        let summaries: Vec<Summary> =
            stream::iter(layers).buffered(AT_A_TIME).try_collect().await?;
        let mut layers: Vec<String> =
            config.diff_ids.iter().map(|id| id.hex().to_owned()).collect();
        let (parents, _kept) = self.parents(&summaries).await?;
        layers.extend(parents);
        let sizes = layers
            .iter()
            .map(|layer| fs::metadata(self.images.folders.file(layer)).map(|data| data.len()));
        let record = Record {
            size: sizes
                .sum::<Result<u64, _>>()
                .map_err(|error| ImageError::io("measure", &self.images.folders.layers, error))?
                + config.text.len() as u64,
            id: config.digest,
            tags: BTreeSet::new(),
            digests: BTreeSet::new(),
            config: config.text,
            layers,
        };
        let mut record = record;
        record.name(self.reference, &root);
        let record = self.images.save(record);
        drop(wanted);
        record
    }

    /// What the name means now, and its document if that had to be fetched to know.
    async fn root(&self) -> Result<(Digest, Option<Vec<u8>>), ImageError> {
        if let Some(digest) = self.reference.digest() {
            return Ok((digest.clone(), None));
        }
        let tag = self.reference.tag().unwrap_or("latest");
        let failed = |source| ImageError::Registry {
            image: self.name.clone(),
            step: format!("resolve tag {tag}"),
            source,
        };
        if let Some(digest) = self.repository.resolve(tag).await.map_err(failed)?.digest {
            return Ok((digest, None));
        }
        let bytes = self.document("manifest", &Target::Tag(tag)).await?;
        Ok((Digest::of(&bytes), Some(bytes)))
    }

    async fn document(&self, what: &str, target: &Target<'_>) -> Result<Vec<u8>, ImageError> {
        self.repository.document(target, LARGEST_DOCUMENT).await.map_err(|source| {
            let digest = match target {
                Target::Tag(tag) => (*tag).to_owned(),
                Target::Manifest(digest) | Target::Blob(digest) => digest.to_string(),
            };
            ImageError::Registry {
                image: self.name.clone(),
                step: format!("{what} {digest}"),
                source,
            }
        })
    }

    /// This machine's manifest, by way of any index.
    async fn manifest(
        &self,
        mut digest: Digest,
        mut bytes: Vec<u8>,
    ) -> Result<Manifest, ImageError> {
        for _ in 0..=MOST_INDEXES {
            let parsed = Document::parse(&bytes)
                .map_err(|why| self.no_image(format!("document {digest}"), why))?;
            let index = match parsed {
                Document::Manifest(manifest) => return Ok(manifest),
                Document::Index(index) => index,
            };
            let chosen =
                choose(&index, &self.platform).map_err(|offered| self.platform(offered))?;
            digest = chosen.digest.clone();
            bytes = self.document("manifest", &Target::Manifest(&digest)).await?;
        }
        Err(self.no_image(
            format!("document {digest}"),
            "it is an index in too many indexes".to_owned(),
        ))
    }

    async fn config(&self, manifest: &Manifest) -> Result<Config, ImageError> {
        let digest = &manifest.config.digest;
        let bytes = self.document("configuration", &Target::Blob(digest)).await?;
        let bad = |why: String| self.no_image(format!("configuration {digest}"), why);
        let text = String::from_utf8(bytes).map_err(|error| bad(error.to_string()))?;
        let config: ImageConfiguration =
            serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
        let fits = |word: &str, own: &str| word.is_empty() || word == own;
        if !fits(&os, &self.platform.os) || !fits(&architecture, &self.platform.architecture) {
            return Err(self.platform(vec![format!("{os}/{architecture}")]));
        }
        let ids = config.rootfs().diff_ids();
        let diff_ids: Vec<Digest> = ids
            .iter()
            .map(|id| id.parse())
            .collect::<Result<_, _>>()
            .map_err(|error| bad(format!("{error}")))?;
        let layers = manifest.layers.len();
        if diff_ids.len() != layers {
            return Err(bad(format!("it has {} layers, the manifest {layers}", diff_ids.len())));
        }
        if layers > MOST_LAYERS {
            return Err(bad(format!("it has {layers} layers, more than {MOST_LAYERS}")));
        }
        Ok(Config { digest: digest.clone(), text, diff_ids })
    }

    /// Brings one layer here, unless it is or another pull does.
    async fn layer(&self, archive: &Descriptor, diff_id: &Digest) -> Result<Summary, ImageError> {
        let folders = &self.images.folders;
        let packing = Packing::of(&archive.media_type).ok_or_else(|| {
            self.no_image(
                format!("layer {}", archive.digest),
                format!("its type is {:?}", archive.media_type),
            )
        })?;
        let _entered = self.images.joins.enter(diff_id.hex()).await;
        if let Some(summary) = folders.read(diff_id.hex()) {
            return Ok(summary);
        }
        let (image, repository) = (&*self.name, &self.repository);
        let summary = Fetch { image, repository, archive, diff_id, packing, folders }.run().await?;
        self.images.fetched.fetch_add(archive.size, Ordering::Relaxed);
        Ok(summary)
    }

    /// The layer that repeats what others would hide, if one is needed.
    async fn parents(
        &self,
        summaries: &[Summary],
    ) -> Result<(Option<String>, Option<Wanted>), ImageError> {
        let parents = parents::hidden(summaries);
        if parents.is_empty() {
            return Ok((None, None));
        }
        let text = serde_json::to_vec(&parents)
            .map_err(|error| self.no_image("its folders".to_owned(), error.to_string()))?;
        let digest = Digest::of(&text);
        let name = format!("parents-{}", digest.hex());
        let wanted = self.images.want(&name);
        let _entered = self.images.joins.enter(&name).await;
        if self.images.folders.read(&name).is_none() {
            self.make_parents(parents, &name, digest).await?;
        }
        Ok((Some(name), Some(wanted)))
    }

    async fn make_parents(
        &self,
        parents: Parents,
        name: &str,
        digest: Digest,
    ) -> Result<(), ImageError> {
        let work = self.images.folders.workplace()?;
        let tree = work.path().join("tree");
        fs::create_dir(&tree).map_err(|error| ImageError::io("create", &tree, error))?;
        let folder = tree.clone();
        let made = spawn_blocking(move || parents::make(&parents, &folder)).await;
        let failed =
            |why| ImageError::Erofs { image: self.name.clone(), layer: digest.clone(), why };
        match made {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(failed(crate::error::chain(&error))),
            Err(_) => return Err(ImageError::Cancelled { image: self.name.clone() }),
        }
        match self.images.folders.keep(name, &work, &tree, &Summary::default()).await {
            Ok(()) => Ok(()),
            Err(KeepError::Io(error)) => Err(error),
            Err(KeepError::Pack(why)) => Err(failed(why)),
        }
    }

    fn platform(&self, offered: Vec<String>) -> ImageError {
        ImageError::Platform {
            image: self.name.clone(),
            wanted: self.platform.to_string(),
            offered,
        }
    }

    fn no_image(&self, what: String, why: String) -> ImageError {
        ImageError::NotAnImage { image: self.name.clone(), what, why }
    }
}
