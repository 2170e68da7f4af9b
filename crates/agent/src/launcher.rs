//! The launcher: forked from the agent before its runtime starts, single-threaded for ever, it
//! does nothing but create children on request. They are its siblings, so the agent is the parent
//! of every process and one reaper serves all.
//!
//! A request is one packet: [`Header`] and the descriptors it counts. The answer is one packet:
//! pid or errno, and a pidfd. The launcher keeps no descriptor between two requests.

use crate::child;
use a3s_box_sys::clone3::{self, Clone3, Cloned, SingleThreaded, namespace};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
    process::Pid,
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
};
use tokio::io::{Interest, unix::AsyncFd};

/// Which descriptors come with a request, in this order.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// The child's end of its control socket.
    pub control: Option<OwnedFd>,
    /// Memfd with the plan.
    pub plan: Option<OwnedFd>,
    /// Standard streams; none for a terminal.
    pub stdio: [Option<OwnedFd>; 3],
    /// Memfd with the compiled seccomp filter.
    pub seccomp: Option<OwnedFd>,
    /// pidfd of the container's init, whose namespaces are joined; with `user_namespace`, of the
    /// process that holds the pod's.
    pub target: Option<OwnedFd>,
    /// pidfd of a process in the PID namespace to start in. With `user_namespace` the child does
    /// that itself, once it is in there.
    pub pid_namespace: Option<OwnedFd>,
    /// The pod's user namespace, in which a container is made.
    pub user_namespace: Option<OwnedFd>,
    /// Folder of the cgroup to start in.
    pub cgroup: Option<OwnedFd>,
    /// The node's mount namespace.
    pub node_mounts: Option<OwnedFd>,
}

const SLOTS: usize = 11;

impl Descriptors {
    fn slots(&mut self) -> [&mut Option<OwnedFd>; SLOTS] {
        let [stdin, stdout, stderr] = &mut self.stdio;
        [
            &mut self.control,
            &mut self.plan,
            stdin,
            stdout,
            stderr,
            &mut self.seccomp,
            &mut self.target,
            &mut self.pid_namespace,
            &mut self.user_namespace,
            &mut self.cgroup,
            &mut self.node_mounts,
        ]
    }
}

/// Namespace bits (8 bytes), which descriptors follow (2 bytes, one bit a slot).
type Header = [u8; 10];

/// A created process.
#[derive(Debug)]
pub struct Launched {
    /// In the agent's PID namespace.
    pub pid: Pid,
    /// Stays this process's.
    pub pidfd: OwnedFd,
}

/// The agent's end.
#[derive(Debug)]
pub struct Launcher {
    socket: AsyncFd<OwnedFd>,
    one_at_a_time: tokio::sync::Mutex<()>,
}

/// Forks the launcher, which does not keep `others`. Returns the socket to it; [`Launcher::new`]
/// takes it once a runtime exists.
pub fn fork<T>(others: T) -> io::Result<(OwnedFd, T)> {
    let (ours, theirs) = packet_pair()?;
    let proof = SingleThreaded::check()?;
    match clone3::clone3(&proof, &Clone3::default())? {
        Cloned::Parent { .. } => Ok((ours, others)),
        Cloned::Child => {
            drop((ours, others));
            run(&proof, theirs)
        }
    }
}

/// A connected pair of packet sockets, closed on exec.
pub fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// The launcher's life; ends with the agent's.
fn run(proof: &SingleThreaded, socket: OwnedFd) -> ! {
    let prepared = prepare();
    let own = match prepared {
        Ok(own) => own,
        Err(error) => {
            crate::log::error(format_args!("launcher: {error}"));
            child::exit(1)
        }
    };
    loop {
        let (namespaces, mut descriptors) = match receive_request(socket.as_fd()) {
            Ok(Some(request)) => request,
            Ok(None) => child::exit(0),
            Err(error) => {
                crate::log::error(format_args!("launcher: request: {error}"));
                child::exit(1)
            }
        };
        let made = launch(proof, own.as_fd(), namespaces, &descriptors);
        let answer = match made {
            Ok(Cloned::Child) => {
                drop(socket);
                drop(own);
                descriptors.cgroup = None;
                child::run(descriptors)
            }
            Ok(Cloned::Parent { pid, pidfd }) => {
                send(socket.as_fd(), &(pid as i32).to_ne_bytes(), &[pidfd.as_fd()])
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
                send(socket.as_fd(), &(-errno).to_ne_bytes(), &[])
            }
        };
        if let Err(error) = answer {
            crate::log::error(format_args!("launcher: answer: {error}"));
            child::exit(1);
        }
    }
}

/// Makes this process opaque to containers that share its PID namespace's descendants, and returns
/// the way back to its own PID namespace.
fn prepare() -> io::Result<OwnedFd> {
    rustix::thread::set_name(c"launcher")?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(rustix::process::pidfd_open(
        rustix::process::getpid(),
        rustix::process::PidfdFlags::empty(),
    )?)
}

fn launch(
    proof: &SingleThreaded,
    own: BorrowedFd<'_>,
    namespaces: u64,
    descriptors: &Descriptors,
) -> io::Result<Cloned> {
    let pid_namespace =
        descriptors.pid_namespace.as_ref().filter(|_| descriptors.user_namespace.is_none());
    if let Some(target) = pid_namespace {
        clone3::join(target.as_fd(), namespace::PID)?;
    }
    let wish = Clone3 {
        namespaces,
        sibling: true,
        cgroup: descriptors.cgroup.as_ref().map(OwnedFd::as_fd),
    };
    let made = clone3::clone3(proof, &wish);
    if pid_namespace.is_some() && !matches!(made, Ok(Cloned::Child)) {
        clone3::join(own, namespace::PID)?;
    }
    made
}

fn receive_request(socket: BorrowedFd<'_>) -> io::Result<Option<(u64, Descriptors)>> {
    let mut header: Header = [0; 10];
    let (length, fds) = receive(socket, &mut header, RecvFlags::empty())?;
    if length == 0 {
        return Ok(None);
    }
    let [n0, n1, n2, n3, n4, n5, n6, n7, p0, p1] = header;
    let namespaces = u64::from_ne_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
    let present = u16::from_ne_bytes([p0, p1]);
    let mut descriptors = Descriptors::default();
    let mut fds = fds.into_iter();
    for (bit, slot) in descriptors.slots().into_iter().enumerate() {
        if present & 1 << bit != 0 {
            *slot = fds.next();
        }
    }
    Ok(Some((namespaces, descriptors)))
}

/// Sends one packet with descriptors.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SLOTS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::io::retry_on_intr(|| {
        sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// Receives one packet with descriptors; length 0 is the end.
pub fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SLOTS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(
            socket,
            &mut [IoSliceMut::new(bytes)],
            &mut control,
            flags | RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((message.bytes, fds))
}

impl Launcher {
    /// Takes the socket that [`fork`] returned; needs a runtime.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::fs::fcntl_setfl(&socket, rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self {
            socket: a3s_box_sys::watch::watch(socket, Interest::READABLE)?,
            one_at_a_time: tokio::sync::Mutex::new(()),
        })
    }

    /// Creates a process with new namespaces (`clone3::namespace` bits) and these descriptors.
    pub async fn launch(
        &self,
        namespaces: u64,
        mut descriptors: Descriptors,
    ) -> io::Result<Launched> {
        let mut header: Header = [0; 10];
        let mut present = 0u16;
        let mut fds = Vec::with_capacity(SLOTS);
        for (bit, slot) in descriptors.slots().into_iter().enumerate() {
            if let Some(fd) = &*slot {
                present |= 1 << bit;
                fds.push(fd.as_fd());
            }
        }
        header[..8].copy_from_slice(&namespaces.to_ne_bytes());
        header[8..].copy_from_slice(&present.to_ne_bytes());

        let _turn = self.one_at_a_time.lock().await;
        send(self.socket.get_ref().as_fd(), &header, &fds)?;
        let mut answer = [0; 4];
        let (length, mut fds) = receive_async(&self.socket, &mut answer).await?;
        if length != answer.len() {
            return Err(io::Error::other("the launcher is gone"));
        }
        match (i32::from_ne_bytes(answer), fds.pop()) {
            (pid, Some(pidfd)) if pid > 0 => {
                let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
                Ok(Launched { pid, pidfd })
            }
            (errno, _) => Err(io::Error::from_raw_os_error(-errno)),
        }
    }
}

/// [`receive`] for the runtime.
pub async fn receive_async(
    socket: &AsyncFd<OwnedFd>,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    loop {
        let mut ready = socket.readable().await?;
        let result =
            ready.try_io(|socket| receive(socket.get_ref().as_fd(), bytes, RecvFlags::DONTWAIT));
        if let Ok(result) = result {
            return result;
        }
    }
}
