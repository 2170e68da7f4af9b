//! What a guest's containers mount in volumes whose mounts go both ways, on the host.
//!
//! ```text
//! container: mount -t tmpfs x /volume/a
//!   agent ── VolumeMounts ──▶ shim: mounts FUSE on HOST_PATH/a, in the host's mount namespace
//!   agent ◀── ServeMount ─── shim ◀── requests of the host's kernel
//! ```
//!
//! The host's folder, its processes and their patience are at stake, and the guest is hostile: a mount
//! appears below the folder that the container was given and nowhere else, what the guest answers is
//! FUSE's data and nothing of it is believed before the host's kernel has checked it, and a guest that
//! leaves one request unanswered for [`PATIENCE`] loses the mount. Every mount goes with its container,
//! with the boundary, and with the shim; after a shim that was killed, the server takes it away.

use a3s_box_api::agent::v1::{self as agent, agent_client::AgentClient};
use a3s_box_sys::watch;
use a3s_box_types::{SandboxId, shim::guest_mounts};
use a3s_box_volume::{MAX_MESSAGE, OUT_HEADER, Orders, Place, is_answered, u32_at, u64_at};
use anyhow::{Context, bail, ensure};
use bytes::{Bytes, BytesMut};
use rustix::{
    fd::{AsFd, OwnedFd},
    io::Errno,
    mount::MountAttrFlags,
};
use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

/// So long the guest may take to answer one request.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at requests without an answer.
const LOOK: Duration = Duration::from_secs(1);
/// So many mounts of one pod are shown.
const MOST: usize = 512;
/// Requests on their way to the guest.
const WAITING: usize = 4;

/// All of a pod's.
#[derive(Debug)]
pub struct GuestMounts {
    host: Arc<Host>,
    /// The host's folders of volumes, by their names in the share.
    places: Mutex<HashMap<String, Place>>,
    /// By the agent's numbers. Held while it changes, so that one change follows another.
    shown: tokio::sync::Mutex<BTreeMap<u64, Shown>>,
    following: Mutex<Option<JoinHandle<()>>>,
}

/// What it takes to mount something there.
#[derive(Debug)]
struct Host {
    /// Its mount namespace.
    mounts: OwnedFd,
    /// The volume server's, which must not see what the guest mounted itself.
    orders: Arc<Orders>,
    sandbox: SandboxId,
}

/// One mount, from its appearance to its end, which may come by itself.
#[derive(Debug)]
struct Shown {
    /// Dropped: it is to end.
    stop: oneshot::Sender<()>,
    ended: JoinHandle<()>,
}

impl GuestMounts {
    /// None yet. `mounts` is the host's mount namespace.
    pub fn new(mounts: OwnedFd, orders: Arc<Orders>, sandbox: SandboxId) -> Self {
        Self {
            host: Arc::new(Host { mounts, orders, sandbox }),
            places: Mutex::default(),
            shown: tokio::sync::Mutex::default(),
            following: Mutex::default(),
        }
    }

    /// From now on, what a container mounts in the volume `name` of the share is mounted in `place`.
    pub fn add(&self, name: String, place: Place) {
        self.places().insert(name, place);
    }

    /// The end of that for all volumes of `container`.
    pub fn forget(&self, container: &str) {
        let prefix = format!("volumes/{container}/");
        self.places().retain(|name, _| !name.starts_with(&prefix));
    }

    fn places(&self) -> std::sync::MutexGuard<'_, HashMap<String, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a container may have mounted anything.
    pub fn are_possible(&self) -> bool {
        !self.places().is_empty()
    }

    /// Shows what the guest has by now, and no longer what it has not.
    pub async fn catch_up(&self, mut agent: AgentClient<Channel>) {
        let now = agent::VolumeMountsRequest { known: 0 };
        let mut shown = self.shown.lock().await;
        let list = match agent.volume_mounts(now).await {
            Ok(list) => list.into_inner().mounts,
            // The boundary's end comes next, and ends them.
            Err(err) => return tracing::warn!(%err, "the guest's mounts cannot be asked for"),
        };
        let gone: Vec<u64> =
            shown.keys().copied().filter(|id| list.iter().all(|one| one.id != *id)).collect();
        // What was mounted on another one goes first.
        for one in gone.iter().rev().filter_map(|id| shown.remove(id)) {
            one.end().await;
        }
        for mount in list {
            if shown.contains_key(&mount.id) {
                continue;
            }
            if shown.len() >= MOST {
                return tracing::warn!(MOST, "the guest has more mounts than are shown");
            }
            let Some(place) = self.places().get(&mount.volume).cloned() else {
                tracing::warn!(volume = mount.volume, "a mount in a volume that shows none");
                continue;
            };
            let path = PathBuf::from(OsStr::from_bytes(&mount.path));
            match show(&self.host, &place, &path, &mount, agent.clone()).await {
                Ok(one) => drop(shown.insert(mount.id, one)),
                Err(err) => {
                    let (volume, path) = (&mount.volume, path.display());
                    tracing::warn!(volume, %path, "a mount of the guest is not shown: {err:#}");
                }
            }
        }
    }

    /// Ends all of them, and waits until they are gone.
    pub async fn end(&self) {
        let following = self.following.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = following {
            task.abort();
        }
        let all = std::mem::take(&mut *self.shown.lock().await);
        for one in all.into_values().rev() {
            one.end().await;
        }
    }
}

impl Shown {
    async fn end(self) {
        drop(self.stop);
        // A panic is in the log.
        self.ended.await.ok();
    }
}

/// Catches up with every change, once there is anything to follow.
pub fn follow(mounts: &Arc<GuestMounts>, agent: &AgentClient<Channel>) {
    let mut following = mounts.following.lock().unwrap_or_else(PoisonError::into_inner);
    following.get_or_insert_with(|| {
        let (mounts, mut agent) = (mounts.clone(), agent.clone());
        tokio::spawn(async move {
            let mut known = 1;
            loop {
                let request = agent::VolumeMountsRequest { known };
                match agent.volume_mounts(request).await {
                    Ok(list) => known = list.into_inner().version,
                    Err(_) => return,
                }
                mounts.catch_up(agent.clone()).await;
            }
        })
    });
}

/// Mounts one on the host and starts the task that serves it.
async fn show(
    host: &Arc<Host>,
    place: &Place,
    path: &Path,
    mount: &agent::VolumeMount,
    agent: AgentClient<Channel>,
) -> anyhow::Result<Shown> {
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    ensure!(plain, "its place is no path in the volume");
    let in_share = if path.as_os_str().is_empty() {
        PathBuf::from(&mount.volume)
    } else {
        Path::new(&mount.volume).join(path)
    };
    let mut flags = MountAttrFlags::empty();
    flags.set(MountAttrFlags::MOUNT_ATTR_RDONLY, mount.read_only);
    flags.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, mount.no_exec);
    let name = format!("{}{}", guest_mounts(&host.sandbox), mount.id);
    let (there, place, path) = (host.clone(), place.clone(), path.to_owned());
    let (held, called) = (in_share.clone(), name.clone());
    // Walking to the place may ask the guest, whose answer this thread brings.
    let requests = blocking(move || {
        there.orders.hold(&held)?;
        let attached = a3s_box_volume::attach(there.mounts.as_fd(), &place, &path, &called, flags);
        if attached.is_err() {
            there.orders.release(&held)?;
        }
        Ok(attached?)
    })
    .await?;
    let (stop, stopped) = oneshot::channel();
    let (host, id) = (host.clone(), mount.id);
    let ended = tokio::spawn(async move {
        let served = async {
            let requests = watch::watch(requests, Interest::READABLE)?;
            serve(&requests, id, agent).await
        };
        let why = tokio::select! {
            served = served => served.err(),
            _ = stopped => None,
        };
        if let Some(why) = why {
            tracing::warn!(mount = name, "a mount of the guest ends: {why:#}");
        }
        let hidden = move || {
            a3s_box_volume::detach(host.mounts.as_fd(), &name)?;
            Ok(host.orders.release(&in_share)?)
        };
        if let Err(err) = blocking(hidden).await {
            tracing::warn!("a mount of the guest does not go: {err:#}");
        }
    });
    Ok(Shown { stop, ended })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// Requests that the guest has not answered yet, and since when.
type Unanswered = Mutex<HashMap<u64, Instant>>;

fn lock(unanswered: &Unanswered) -> std::sync::MutexGuard<'_, HashMap<u64, Instant>> {
    unanswered.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Carries requests to the guest and answers back, until the host unmounts it.
async fn serve(
    requests: &AsyncFd<OwnedFd>,
    id: u64,
    mut agent: AgentClient<Channel>,
) -> anyhow::Result<()> {
    let mut message = vec![0; MAX_MESSAGE];
    let Some(length) = receive(requests, &mut message).await? else { return Ok(()) };
    let init = &message[..length];
    // What the host's kernel may use is not for the guest to say.
    let answer = a3s_box_volume::answer(init).context("the host's FUSE is too old")?;
    rustix::io::write(requests.get_ref(), &answer).context("answer FUSE_INIT")?;
    let (to_guest, inputs) = mpsc::channel(WAITING);
    let messages = Bytes::copy_from_slice(init);
    to_guest.send(agent::MountInput { id, messages, ..Default::default() }).await?;
    let outputs = agent.serve_mount(ReceiverStream::new(inputs)).await?.into_inner();
    let unanswered = Unanswered::default();
    let unmounted = tokio::select! {
        ended = ask(requests, &mut message, &to_guest, &unanswered) => ended?,
        ended = answer_all(requests, outputs, &unanswered) => ended?,
        () = lose_patience(&unanswered) => {
            bail!("the guest has not answered within {} s", PATIENCE.as_secs())
        }
    };
    if unmounted {
        let goodbye = agent::MountInput { unmounted, ..Default::default() };
        // The guest may have gone as well.
        to_guest.send(goodbye).await.ok();
    }
    Ok(())
}

/// Reads the kernel's next request; none when it has no more, because the mount is gone.
async fn receive(requests: &AsyncFd<OwnedFd>, message: &mut [u8]) -> anyhow::Result<Option<usize>> {
    loop {
        let mut ready = requests.readable().await?;
        let read = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *message)?));
        let error = match read {
            Ok(Ok(length)) => return Ok(Some(length)),
            Ok(Err(error)) => error,
            Err(_) => continue,
        };
        match Errno::from_io_error(&error) {
            Some(Errno::NODEV) => return Ok(None),
            // The request was taken back before it was read.
            Some(Errno::NOENT | Errno::INTR) => {}
            _ => return Err(error).context("read the kernel's request"),
        }
    }
}

async fn ask(
    requests: &AsyncFd<OwnedFd>,
    message: &mut [u8],
    to_guest: &mpsc::Sender<agent::MountInput>,
    unanswered: &Unanswered,
) -> anyhow::Result<bool> {
    while let Some(length) = receive(requests, message).await? {
        let request = &message[..length];
        if is_answered(u32_at(request, 4)) {
            lock(unanswered).insert(u64_at(request, 8), Instant::now());
        }
        let messages = Bytes::copy_from_slice(request);
        to_guest
            .send(agent::MountInput { messages, ..Default::default() })
            .await
            .context("the guest takes no more requests")?;
    }
    Ok(true)
}

async fn answer_all(
    requests: &AsyncFd<OwnedFd>,
    mut outputs: Streaming<agent::MountOutput>,
    unanswered: &Unanswered,
) -> anyhow::Result<bool> {
    let mut received = BytesMut::new();
    loop {
        let output = outputs.message().await?.context("the guest serves it no longer")?;
        received.extend_from_slice(&output.messages);
        while received.len() >= OUT_HEADER {
            let length = u32_at(&received, 0) as usize;
            ensure!((OUT_HEADER..=MAX_MESSAGE).contains(&length), "an answer of impossible length");
            if received.len() < length {
                break;
            }
            let answer = received.split_to(length);
            // Only what was asked for: no notifications, and nothing twice.
            if lock(unanswered).remove(&u64_at(&answer, 8)).is_some() {
                hand_over(requests.get_ref(), &answer)?;
            }
        }
    }
}

/// Gives the kernel an answer. It refuses one whose request was taken back, and one that makes no sense.
fn hand_over(requests: &OwnedFd, answer: &[u8]) -> anyhow::Result<()> {
    loop {
        match rustix::io::write(requests, answer) {
            Err(Errno::INTR) => {}
            Ok(_) | Err(Errno::NOENT) => return Ok(()),
            // The next read says that it is gone.
            Err(Errno::NODEV | Errno::PERM | Errno::CONNABORTED) => return Ok(()),
            Err(error) => {
                return Err(io::Error::from(error)).context("the kernel refuses an answer");
            }
        }
    }
}

/// Returns when the oldest request is too old.
async fn lose_patience(unanswered: &Unanswered) {
    loop {
        tokio::time::sleep(LOOK).await;
        let oldest = lock(unanswered).values().min().copied();
        if oldest.is_some_and(|since| since.elapsed() > PATIENCE) {
            return;
        }
    }
}
