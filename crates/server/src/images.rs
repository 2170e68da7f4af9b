//! The image store as the RPCs see it: the seam between the CRI and the `image` crate.

use crate::{
    node::{self, ContainerImage},
    status::Failure,
};
use oci_spec::image::ImageConfiguration;
use std::path::PathBuf;
use tonic::Code;

/// One pulled image.
#[derive(Debug, Clone)]
pub struct Image {
    /// `sha256:...`, the digest of its config.
    pub id: String,
    /// `name:tag`, may be none.
    pub repo_tags: Vec<String>,
    /// `name@digest`, may be none.
    pub repo_digests: Vec<String>,
    /// Bytes on this node.
    pub size: u64,
    /// Entry point, environment, user and the like.
    pub config: ImageConfiguration,
    /// EROFS blobs, lowest first.
    pub layers: Vec<PathBuf>,
    /// Never to be collected.
    pub pinned: bool,
}

/// Who asks a registry. Empty fields say nothing.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Auth {
    /// With `password`.
    pub username: String,
    /// With `username`.
    pub password: String,
    /// base64 of `username:password`, instead of both.
    pub auth: String,
    /// The registry these are for.
    pub server_address: String,
    /// An OAuth2 refresh token.
    pub identity_token: String,
    /// A bearer token.
    pub registry_token: String,
}

/// What images take up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// An RPC about images failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageRpcError {
    /// A field has a value that means nothing.
    #[error("{field}: {why}")]
    Invalid {
        /// As the CRI names it.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The store's own error.
    #[error("{step}")]
    Store {
        /// What was tried, on what.
        step: String,
        /// What it means to a CRI client.
        code: Code,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Failure for ImageRpcError {
    fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::Store { code, .. } => *code,
        }
    }
}

/// Pulled images, by any of their names.
#[tonic::async_trait]
pub trait ImageStore: Send + Sync {
    /// All images.
    fn list(&self) -> Vec<Image>;
    /// The image with this tag, digest, id or short name.
    fn resolve(&self, name: &str) -> Option<Image>;
    /// Fetches what is not there yet of the image.
    async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<Image, ImageRpcError>;
    /// Removes the image with all its names. OK when there is none.
    async fn remove(&self, name: &str) -> Result<(), ImageRpcError>;
    /// Bytes of layers that came from registries since the store was opened.
    fn fetched_bytes(&self) -> u64;
    /// What all images take up.
    async fn usage(&self) -> Result<Usage, ImageRpcError>;
}

/// The name of an image in a request; without one the request means nothing.
pub fn name_of(spec: Option<&a3s_box_api::cri::ImageSpec>) -> Result<&str, ImageRpcError> {
    match spec.map(|spec| spec.image.as_str()) {
        Some(name) if !name.is_empty() => Ok(name),
        _ => Err(ImageRpcError::Invalid { field: "image", why: "is empty".to_owned() }),
    }
}

/// Containers' view of the store.
pub struct ForContainers(pub std::sync::Arc<dyn ImageStore>);

impl node::Images for ForContainers {
    fn resolve(&self, name: &str) -> Option<ContainerImage> {
        self.0.resolve(name).map(|image| ContainerImage {
            id: image.id,
            tags: image.repo_tags,
            digests: image.repo_digests,
            config: image.config,
            layers: image.layers,
        })
    }
}
