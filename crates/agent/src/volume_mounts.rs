//! What containers mount in volumes whose mounts go both ways, and serving it to the host.
//!
//! The share is a shared mount, and such a volume is its peer, so what a container mounts there appears
//! in the agent's mount namespace below `/share/volumes/CONTAINER/N`. Each of these mounts is served by
//! a process of its own, which ends when the host hangs up: then nothing of it is in use any more.

use crate::{
    agent::{Agent, blocking},
    config::{Boundary, Config},
    error::{Error, Step},
    launcher::Descriptors,
    plan::{Plan, ServePlan},
};
use a3s_box_api::agent::v1 as api;
use a3s_box_sys::{clone3::namespace, mount_table};
use bytes::Bytes;
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};
use std::{
    fs::File,
    io,
    os::unix::{ffi::OsStrExt, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    sync::{mpsc, watch},
};
use tonic::{Status, Streaming};

/// Bytes of answers that are sent on at once.
const PIECE: usize = 64 << 10;
/// `STATX_MNT_ID_UNIQUE`: the number that no later mount has.
const UNIQUE_ID: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// One of them.
#[derive(Debug, Clone, PartialEq)]
struct Found {
    point: PathBuf,
    shown: api::VolumeMount,
}

/// All of them.
#[derive(Debug)]
pub struct VolumeMounts {
    boundary: Boundary,
    volumes: PathBuf,
    staging: PathBuf,
    found: Arc<Mutex<Vec<Found>>>,
    /// Counts the changes.
    version: Arc<watch::Sender<u64>>,
}

impl VolumeMounts {
    /// None yet.
    pub fn new(config: &Config) -> Self {
        Self {
            boundary: config.boundary,
            volumes: config.share.join("volumes"),
            staging: config.staging(),
            found: Arc::default(),
            version: Arc::new(watch::Sender::new(1)),
        }
    }

    /// Notes changes as they happen, for ever.
    pub async fn run(&self) -> io::Result<()> {
        let table = File::open("/proc/self/mountinfo")?;
        let table = a3s_box_sys::watch::watch(table.into(), Interest::PRIORITY)?;
        loop {
            table.ready(Interest::PRIORITY).await?.clear_ready();
            if let Err(error) = self.look().await {
                crate::log::error(format_args!("table of mounts: {error}"));
            }
        }
    }

    /// Notes what is there now.
    async fn look(&self) -> Result<(), Error> {
        let volumes = self.volumes.clone();
        let (found, version) = (Arc::clone(&self.found), Arc::clone(&self.version));
        blocking(move || {
            // Held from before the look: a later look is not overwritten by an earlier one.
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            let now = find(&volumes).step("table of mounts")?;
            if *found != now {
                *found = now;
                version.send_modify(|version| *version += 1);
            }
            Ok(())
        })
        .await
    }

    /// The list, when it is not that of version `known` any more.
    pub async fn list(&self, known: u64) -> Result<api::VolumeMountsResponse, Error> {
        if known == 0 && self.boundary == Boundary::Guest {
            self.look().await?;
        }
        let mut version = self.version.subscribe();
        version
            .wait_for(|version| *version != known)
            .await
            .map_err(io::Error::other)
            .step("list")?;
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let mounts = found.iter().map(|one| one.shown.clone()).collect();
        Ok(api::VolumeMountsResponse { version: *self.version.borrow(), mounts })
    }

    /// Takes away what a container that has ended has left.
    pub async fn end(&self, container: &str) -> Result<(), Error> {
        if self.boundary == Boundary::Host {
            return Ok(());
        }
        let folder = self.volumes.join(container);
        blocking(move || {
            let of_container = |mount: &mount_table::Mount| mount.point.starts_with(&folder);
            mount_table::unmount_all(of_container).step("unmount what it mounted in its volumes")
        })
        .await
    }

    fn point(&self, id: u64) -> Result<PathBuf, Error> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let one = found.iter().find(|one| one.shown.id == id);
        one.map(|one| one.point.clone())
            .ok_or_else(|| Error::NotNow(format!("mount {id} has gone")))
    }
}

/// Looks for mounts of containers. One that another hides is not to be seen in the container either.
fn find(volumes: &Path) -> io::Result<Vec<Found>> {
    let mut all: Vec<Found> = Vec::new();
    for mount in mount_table::read()? {
        let Some((volume, path)) = mount.point.strip_prefix(volumes).ok().and_then(split) else {
            continue;
        };
        let Some(id) = unique_id(&mount.point) else { continue };
        let shown = api::VolumeMount {
            id,
            volume: format!("volumes/{volume}"),
            path: Bytes::copy_from_slice(path.as_os_str().as_bytes()),
            read_only: mount.read_only,
            no_exec: mount.no_exec,
        };
        all.retain(|other| other.shown.id != id);
        all.push(Found { point: mount.point, shown });
    }
    Ok(all)
}

/// `CONTAINER/N` and the rest.
fn split(path: &Path) -> Option<(String, PathBuf)> {
    let mut parts = path.iter();
    let (container, number) = (parts.next()?.to_str()?, parts.next()?.to_str()?);
    Some((format!("{container}/{number}"), parts.collect()))
}

/// The mount on top of that place; none when it is gone, or is a file's. Asks its file system nothing, and
/// holds it no longer than one call: whoever unmounts it at this moment would be told that it is busy.
fn unique_id(point: &Path) -> Option<u64> {
    let quietly = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(CWD, point, quietly, UNIQUE_ID | StatxFlags::TYPE).ok()?;
    let is_folder = FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory;
    is_folder.then_some(found.stx_mnt_id)
}

/// Serves a mount to the host; the answers end when it cannot go on.
pub async fn serve(
    agent: Arc<Agent>,
    first: api::MountInput,
    inputs: Streaming<api::MountInput>,
    answers: mpsc::Sender<Result<api::MountOutput, Status>>,
) {
    if let Err(error) = relay(&agent, first, inputs, &answers).await {
        // Whoever does not listen any more knows enough.
        answers.send(Err(error.into())).await.ok();
    }
}

async fn relay(
    agent: &Agent,
    first: api::MountInput,
    mut inputs: Streaming<api::MountInput>,
    answers: &mpsc::Sender<Result<api::MountOutput, Status>>,
) -> Result<(), Error> {
    let point = agent.volume_mounts.point(first.id)?;
    let (ours, theirs) = UnixStream::pair().step("the mount's stream")?;
    ours.set_nonblocking(true).step("the mount's stream")?;
    let stream = tokio::net::UnixStream::from_std(ours).step("the mount's stream")?;
    let plan = Plan::Serve(ServePlan {
        mount: point.clone(),
        staging: agent.volume_mounts.staging.clone(),
    });
    let descriptors =
        Descriptors { stdio: [Some(theirs.into()), None, None], ..Default::default() };
    let server = agent.spawn(&plan, namespace::MOUNT, descriptors).await?;
    let (mut from_server, mut to_server) = stream.into_split();
    let requests = async {
        let mut next = Some(first);
        while let Some(input) = next {
            to_server.write_all(&input.messages).await.step("ask the mount's server")?;
            if input.unmounted {
                return Ok(true);
            }
            next = inputs.message().await.ok().flatten();
        }
        Ok::<_, Error>(false)
    };
    let replies = async {
        let mut piece = vec![0; PIECE];
        loop {
            let length = from_server.read(&mut piece).await.step("hear from the mount's server")?;
            if length == 0 {
                return Err(Error::NotNow("the mount's server has ended".to_owned()));
            }
            let messages = Bytes::copy_from_slice(&piece[..length]);
            if answers.send(Ok(api::MountOutput { messages })).await.is_err() {
                return Ok(false);
            }
        }
    };
    let unmounted = tokio::select! {
        done = requests => done?,
        done = replies => done?,
    };
    // What it still does is for nobody.
    a3s_box_sys::pidfd::kill(&server.pidfd).step("end the mount's server")?;
    if unmounted {
        blocking(move || {
            let same = |mount: &mount_table::Mount| mount.point == point;
            mount_table::unmount_all(same).step(format_args!("unmount {}", point.display()))
        })
        .await?;
    }
    Ok(())
}
