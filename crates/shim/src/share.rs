//! What a pod may see of the host: image layers and its containers' volumes.

use crate::guest_mounts::GuestMounts;
use a3s_box_volume::{Access, Orders, Place, Propagation, Share, Source};
use oci_spec::runtime::{Mount, Spec};
use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tonic::Status;

/// In volumes that kubelet updates as a whole, the link to what they hold.
const UPDATED: &str = "..data";
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
    /// The volume server's.
    orders: Arc<Orders>,
    images: Mutex<HashSet<String>>,
    pool: Mutex<Pool>,
    guest_mounts: Arc<GuestMounts>,
}

/// What a volume shows of the host, and how.
type Shows = (PathBuf, Source, Access, Propagation);

/// The volumes that several containers may have.
#[derive(Debug, Default)]
struct Pool {
    volumes: HashMap<Shows, Pooled>,
    /// How many there have been.
    made: u64,
}

/// One of them. Were it another one for each of them, a file would be
/// another file, and no lock on it or socket in it would reach from one to the other.
#[derive(Debug)]
struct Pooled {
    name: String,
    containers: HashSet<String>,
}

impl PodShare {
    /// Around an empty share.
    pub fn of_guest(share: Share, orders: Arc<Orders>, guest_mounts: GuestMounts) -> Self {
        let guest_mounts = Arc::new(guest_mounts);
        Self::Guest(GuestShare {
            share,
            orders,
            images: Mutex::default(),
            pool: Mutex::default(),
            guest_mounts,
        })
    }

    /// What the guest's containers have mounted; none where the host's kernel does it.
    pub fn guest_mounts(&self) -> Option<&Arc<GuestMounts>> {
        match self {
            Self::Guest(share) => Some(&share.guest_mounts),
            Self::Host => None,
        }
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
                Self::Guest(share) => share.add_volume(container, number, &resolved, mount)?,
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
    fn add_volume(
        &self,
        container: &str,
        number: usize,
        source: &Path,
        mount: &mut Mount,
    ) -> Result<PathBuf, Status> {
        let access = if has_option(mount, "rro") {
            Access::ReadOnlyRecursive
        } else if has_option(mount, "ro") {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let both_ways = has_option(mount, "rshared") || has_option(mount, "shared");
        let propagation = if both_ways || has_option(mount, "rslave") || has_option(mount, "slave")
        {
            Propagation::HostToContainer
        } else {
            Propagation::Private
        };
        let own = format!("volumes/{container}/{number}");
        let name = if both_ways {
            self.show(&own, source, access, propagation)?;
            let place = Place::at(source).map_err(|err| failed("look at", source, &err))?;
            if let Some(place) = place {
                self.guest_mounts.add(own.clone(), place);
            }
            own
        } else {
            self.add_pooled(container, own, source, access, propagation)?
        };
        // The guest has one mount for all of them, so here it is the host's mounts that are
        // read-only or not.
        let below = propagation == Propagation::HostToContainer
            || self
                .share
                .has_mounts_below(&name)
                .map_err(|err| failed("look below", source, &err))?;
        if access == Access::ReadOnly && below {
            allow_writes(mount);
        }
        Ok(PathBuf::from(format!("{IN_GUEST}/{name}")))
    }

    /// The name of a volume that shows `source`: one that other containers may have, or `own`.
    fn add_pooled(
        &self,
        container: &str,
        own: String,
        source: &Path,
        access: Access,
        propagation: Propagation,
    ) -> Result<String, Status> {
        let what = Source::at(source).map_err(|err| failed("look at", source, &err))?;
        // What is mounted below it now is shown for good, and may be something else the next time.
        if propagation == Propagation::Private && what.has_mounts_below {
            self.show(&own, source, access, propagation)?;
            return Ok(own);
        }
        let mut pool = self.pool();
        let shows = (source.to_owned(), what, access, propagation);
        if let Some(known) = pool.volumes.get_mut(&shows) {
            known.containers.insert(container.to_owned());
            return Ok(known.name.clone());
        }
        let name = format!("volumes/pod/{}", pool.made);
        self.show(&name, source, access, propagation)?;
        pool.made += 1;
        let containers = HashSet::from([container.to_owned()]);
        pool.volumes.insert(shows, Pooled { name: name.clone(), containers });
        Ok(name)
    }

    fn show(
        &self,
        name: &str,
        source: &Path,
        access: Access,
        propagation: Propagation,
    ) -> Result<(), Status> {
        self.share
            .add(name, source, access, propagation)
            .map_err(|err| failed("share the mount", source, &err))?;
        if source.join(UPDATED).is_symlink() {
            let watched = self.orders.watch(Path::new(name));
            watched.map_err(|err| failed("watch", source, &err))?;
        }
        Ok(())
    }

    fn remove_volumes(&self, container: &str) -> Result<(), Status> {
        self.guest_mounts.forget(container);
        for name in self.pool().without(container) {
            self.hide(&name)?;
        }
        self.hide(&format!("volumes/{container}"))
    }

    fn hide(&self, name: &str) -> Result<(), Status> {
        let unwatched = self.orders.unwatch(Path::new(name));
        unwatched
            .and_then(|()| self.share.remove(name))
            .map_err(|err| failed("take away", Path::new(name), &err))
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// Takes a container's part in all of them away; the names of those that nobody has any more.
    fn without(&mut self, container: &str) -> Vec<String> {
        let mut free = Vec::new();
        self.volumes.retain(|_, volume| {
            let left = volume.containers.remove(container) && volume.containers.is_empty();
            if left {
                free.push(volume.name.clone());
            }
            !left
        });
        free
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
