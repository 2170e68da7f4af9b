//! What the RPCs of sandboxes and containers share.

use crate::{
    sandbox::{SandboxError, Sandboxes},
    vm_size::SizeRules,
};
use oci_spec::image::ImageConfiguration;
use std::{collections::BTreeSet, path::PathBuf};

/// Sandboxes, images and the configuration's rules for them.
pub struct Node {
    /// All sandboxes.
    pub sandboxes: Sandboxes,
    /// For CreateContainer.
    pub images: Box<dyn Images>,
    /// Sizes of virtual machines.
    pub sizes: SizeRules,
    /// Names of the runtime handlers.
    pub handlers: BTreeSet<String>,
}

/// The image store, as far as containers need it.
pub trait Images: Send + Sync {
    /// The image with this name, digest or id; `None` when it was not pulled.
    fn resolve(&self, name: &str) -> Option<ContainerImage>;
}

/// An image that a container is made of.
#[derive(Debug, Clone)]
pub struct ContainerImage {
    /// Digest of its config.
    pub id: String,
    /// `name:tag`, may be none.
    pub tags: Vec<String>,
    /// `name@digest`, may be none.
    pub digests: Vec<String>,
    /// Entry point, environment, user and the like.
    pub config: ImageConfiguration,
    /// EROFS blobs, lowest first.
    pub layers: Vec<PathBuf>,
}

impl Node {
    /// Refuses a handler that is not configured.
    pub fn check_handler(&self, name: &str) -> Result<(), SandboxError> {
        if self.handlers.contains(name) {
            return Ok(());
        }
        let known: Vec<_> = self.handlers.iter().map(|name| format!("{name:?}")).collect();
        let why = format!("{name:?} is not configured; there are {}", known.join(", "));
        Err(SandboxError::invalid("runtime_handler", why))
    }
}
