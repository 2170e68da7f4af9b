//! What a pod may see of the host: image layers and its containers' volumes.

use a3s_box_volume::{Access, Propagation, Share};
use oci_spec::runtime::{Mount, Spec};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};
use tonic::Status;

/// Where the guest has the share.
const IN_GUEST: &str = "/share";

/// What the boundary sees of the host.
#[derive(Debug)]
pub enum PodShare {
    /// What is put into the share, and nothing else.
    Guest(GuestShare),
    /// Everything: it is on the host. Names are host paths below `/`.
    Host,
}

/// The share and what is in it already.
#[derive(Debug)]
pub struct GuestShare {
    share: Share,
    images: Mutex<HashSet<String>>,
}

impl PodShare {
    /// Around an empty share.
    pub fn of_guest(share: Share) -> Self {
        Self::Guest(GuestShare { share, images: Mutex::default() })
    }

    /// Shows the blobs, each once for all containers, and returns the names that the agent knows them by.
    pub fn add_layers(&self, blobs: &[String]) -> Result<Vec<String>, Status> {
        match self {
            Self::Guest(share) => share.add_layers(blobs),
            Self::Host => Ok(blobs.iter().map(|b| b.trim_start_matches('/').to_owned()).collect()),
        }
    }

    /// Shows the source of every bind mount of `spec` and makes the agent's path its source.
    pub fn add_volumes(&self, container: &str, spec: &mut Spec) -> Result<(), Status> {
        let Some(mounts) = spec.mounts_mut() else {
            return Ok(());
        };
        for (number, mount) in mounts.iter_mut().enumerate().filter(|(_, mount)| is_bind(mount)) {
            let source = mount.source().clone().unwrap_or_default();
            let resolved = source.canonicalize().map_err(|err| {
                let to = mount.destination().display();
                Status::invalid_argument(format!("mount {} to {to}: {err}", source.display()))
            })?;
            let shown = match self {
                Self::Guest(share) => {
                    let name = format!("volumes/{container}/{number}");
                    share.add_volume(&name, &resolved, mount)?
                }
                Self::Host => resolved,
            };
            mount.set_source(Some(shown));
        }
        Ok(())
    }

    /// Takes a container's volumes away again; fine when it has none.
    pub fn remove_volumes(&self, container: &str) -> Result<(), Status> {
        match self {
            Self::Guest(share) => share.remove_volumes(container),
            Self::Host => Ok(()),
        }
    }
}

impl GuestShare {
    fn add_layers(&self, blobs: &[String]) -> Result<Vec<String>, Status> {
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names = Vec::with_capacity(blobs.len());
        for blob in blobs {
            let blob = Path::new(blob);
            let file = blob.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
                Status::invalid_argument(format!("layer {} has no file name", blob.display()))
            })?;
            let name = format!("images/{file}");
            if !images.contains(&name) {
                self.share
                    .add(&name, blob, Access::ReadOnly, Propagation::Private)
                    .map_err(|err| failed("share the layer", blob, &err))?;
                images.insert(name.clone());
            }
            names.push(name);
        }
        Ok(names)
    }

    /// Shows the source of a mount; the guest's path of it.
    fn add_volume(&self, name: &str, source: &Path, mount: &mut Mount) -> Result<PathBuf, Status> {
        let access = if has_option(mount, "rro") {
            Access::ReadOnlyRecursive
        } else if has_option(mount, "ro") {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let followed = ["rslave", "slave", "rshared", "shared"];
        let propagation = if followed.iter().any(|option| has_option(mount, option)) {
            Propagation::HostToContainer
        } else {
            Propagation::Private
        };
        self.share
            .add(name, source, access, propagation)
            .map_err(|err| failed("share the mount", source, &err))?;
        // The guest has one mount for all of them, so here it is the host's mounts that are
        // read-only or not.
        let below = propagation == Propagation::HostToContainer
            || self
                .share
                .has_mounts_below(name)
                .map_err(|err| failed("look below", source, &err))?;
        if access == Access::ReadOnly && below {
            allow_writes(mount);
        }
        Ok(PathBuf::from(format!("{IN_GUEST}/{name}")))
    }

    fn remove_volumes(&self, container: &str) -> Result<(), Status> {
        let name = format!("volumes/{container}");
        self.share.remove(&name).map_err(|err| failed("take away", Path::new(&name), &err))
    }
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || has_option(mount, "bind")
        || has_option(mount, "rbind")
}

fn allow_writes(mount: &mut Mount) {
    for option in mount.options_mut().iter_mut().flatten().filter(|option| *option == "ro") {
        *option = "rw".to_owned();
    }
}

fn has_option(mount: &Mount, wanted: &str) -> bool {
    mount.options().iter().flatten().any(|option| option == wanted)
}

fn failed(step: &str, what: &Path, err: &a3s_box_volume::Error) -> Status {
    Status::internal(format!("{step} {}: {}", what.display(), crate::service::chain(err)))
}
