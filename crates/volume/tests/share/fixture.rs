//! A share with a guest: what most tests begin with.

use a3s_box_volume::{Access, Orders, Owner, Propagation, Share};
use anyhow::{Context, Result, ensure};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

/// A mount namespace of the test's own, as the shim's.
pub fn isolate() -> Result<()> {
    a3s_box_sys::clone3::unshare(a3s_box_sys::clone3::namespace::MOUNT)?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave)?;
    Ok(())
}

fn stdin() -> Result<OwnedFd> {
    Ok(std::io::stdin().as_fd().try_clone_to_owned()?)
}

/// The volume server's process; the stream is its standard input.
pub fn server(root: &str, after_init: bool) -> Result<()> {
    let init =
        if after_init { Some(fs::read(Path::new(root).with_extension("init"))?) } else { None };
    let orders = UnixStream::connect(Path::new(root).with_extension("orders")).ok();
    let owner = orders.map(|orders| Owner { orders, charged: 12_345 });
    a3s_box_volume::serve(Path::new(root), UnixStream::from(stdin()?), init, owner)?;
    Ok(())
}

/// The server of a mount of the guest; the stream is its standard input.
pub fn mount_server(root: &str) -> Result<()> {
    Ok(a3s_box_volume::serve_mount(Path::new(root), UnixStream::from(stdin()?))?)
}

/// The guest agent's part: mounts, says so, and pumps; the port is its standard input.
pub fn pump(target: &str) -> Result<()> {
    let fuse = a3s_box_volume::mount(Path::new(target))?;
    println!("mounted");
    a3s_box_volume::pump(fuse, stdin()?.into(), Path::new(target))?;
    Ok(())
}

/// Ends with 7 when another process holds a lock of the file at `path`.
pub fn lock(path: &str) -> ExitCode {
    let locked = File::options()
        .write(true)
        .open(path)
        .map(|file| rustix::fs::fcntl_lock(file, FlockOperation::NonBlockingLockExclusive));
    match locked {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(Errno::AGAIN | Errno::ACCESS)) => ExitCode::from(7),
        _ => ExitCode::FAILURE,
    }
}

/// Runs this program as another process of the share.
pub fn process(arguments: &[&str], stream: OwnedFd, output: Stdio) -> Result<Process> {
    let child = Command::new(std::env::current_exe()?)
        .args(arguments)
        .stdin(stream)
        .stdout(output)
        .spawn()?;
    Ok(Process(child))
}

/// Ends with the test.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Host and guest of one pod.
pub struct Pod {
    // In this order: a guest without its server is answered EIO, one without its pump nothing.
    pub server: Process,
    pub pump: Process,
    pub share: Share,
    pub orders: Orders,
    /// Where the guest sees the share.
    pub guest: PathBuf,
    /// The host's folders.
    pub host: PathBuf,
    pub dir: tempfile::TempDir,
}

impl Pod {
    pub fn start() -> Result<Self> {
        // The guest finds folders without asking for them: /tmp may be a tmpfs without user.*
        // attributes on old kernels.
        let dir = tempfile::Builder::new().prefix("a3s-box-volume-").tempdir_in("/var/tmp")?;
        let [root, guest, host] = ["share", "guest", "host"].map(|name| dir.path().join(name));
        fs::create_dir(&guest)?;
        fs::create_dir(&host)?;
        let share = Share::create(&root)?;
        let (ours, theirs) = UnixStream::pair()?;
        let orders = UnixListener::bind(root.with_extension("orders"))?;
        let root = root.to_str().context("path")?;
        let server = process(&["server", root], ours.into(), Stdio::inherit())?;
        let orders = Orders::new(orders.accept()?.0);
        let target = guest.to_str().context("path")?;
        let mut pump = process(&["pump", target], theirs.into(), Stdio::piped())?;
        let mut line = String::new();
        BufReader::new(pump.0.stdout.take().context("stdout")?).read_line(&mut line)?;
        ensure!(line == "mounted\n", "the guest did not mount the share");
        Ok(Self { server, pump, share, orders, guest, host, dir })
    }

    /// A folder of the host as volume `c/NAME`: its path on the host and in the guest.
    pub fn volume(&self, name: &str, access: Access) -> Result<(PathBuf, PathBuf)> {
        let host = self.host.join(name);
        fs::create_dir_all(&host)?;
        let name = format!("volumes/c/{name}");
        self.share.add(&name, &host, access, Propagation::HostToContainer)?;
        Ok((host, self.guest.join(name)))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A pump that waits for an answer of its own mount could never be killed: all of them fail now.
        rustix::mount::unmount(&self.guest, UnmountFlags::FORCE | UnmountFlags::DETACH).ok();
        rustix::mount::unmount(self.dir.path().join("share"), UnmountFlags::DETACH).ok();
        // What a test has mounted there itself would keep the folder from being removed.
        for entry in fs::read_dir(&self.host).into_iter().flatten().flatten() {
            rustix::mount::unmount(entry.path(), UnmountFlags::DETACH).ok();
        }
    }
}

/// A pod with one writable volume: the volume on the host and in the guest.
pub fn volume() -> Result<(Pod, PathBuf, PathBuf)> {
    let pod = Pod::start()?;
    let (host, guest) = pod.volume("0", Access::ReadWrite)?;
    Ok((pod, host, guest))
}

/// Runs `script` as `uid` and `gid` in `folder` and returns what it prints.
pub fn shell(folder: &Path, uid: u32, gid: u32, groups: &str, script: &str) -> Result<String> {
    let mut command = Command::new("setpriv");
    command
        .arg(format!("--reuid={uid}"))
        .arg(format!("--regid={gid}"))
        .arg(match groups {
            "" => "--clear-groups".to_owned(),
            groups => format!("--groups={groups}"),
        })
        .args(["sh", "-ec", script])
        .current_dir(folder)
        .stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let mut output = String::new();
    child.stdout.take().context("stdout")?.read_to_string(&mut output)?;
    ensure!(child.wait()?.success(), "{script}: failed");
    Ok(output)
}

/// The system's answer to something that should fail.
pub fn refusal<T>(result: std::io::Result<T>) -> Option<rustix::io::Errno> {
    rustix::io::Errno::from_io_error(&result.err()?)
}
