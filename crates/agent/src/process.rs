//! The last metres before exec: standard streams, limits, user, capabilities, seccomp, lookup of
//! the command. For a container's first process and for exec alike.

use crate::{
    child::{invalid, step, text},
    plan::{Failure, FailureKind, Process, User},
    users,
};
use a3s_box_sys::{exec, seccomp};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{Access, AtFlags, CWD, Mode, OFlags},
    io::Errno,
    process::{Resource, Rlimit},
    termios::Winsize,
    thread::{CapabilitySet, CapabilitySets},
};
use std::{
    convert::Infallible,
    ffi::CString,
    fs, io,
    path::{Path, PathBuf},
};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The group of terminals, by convention of every distribution.
const TTY_GROUP: u32 = 5;

/// Puts the given descriptors, or a new terminal of the container, on 0, 1 and 2, and returns the
/// terminal's master.
pub fn take_stdio(
    stdio: &[Option<OwnedFd>; 3],
    process: &Process,
    user: &User,
) -> Result<Option<OwnedFd>, Failure> {
    let owner = Some(rustix::fs::Uid::from_raw(user.uid));
    if process.terminal {
        return terminal(process, user).map(Some);
    }
    for (number, stream) in (0..).zip(stdio) {
        let Some(stream) = stream else { continue };
        // So that a program of another user may open /dev/stdout. Not on a device the pod shares.
        if user.uid != 0 && is_pipe(stream)? {
            step(rustix::fs::fchown(stream, owner, None), "owner of the standard streams")?;
        }
        step(exec::set_stdio(stream.as_fd(), number), "standard streams")?;
    }
    Ok(None)
}

/// Gives the pipes among the standard streams to another user: from inside a user namespace, files
/// of the guest's users cannot be changed.
pub fn give_stdio(stdio: &[Option<OwnedFd>; 3], uid: u32, gid: u32) -> Result<(), Failure> {
    let owner = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
    for stream in stdio.iter().flatten() {
        if is_pipe(stream)? {
            let given = rustix::fs::fchown(stream, Some(owner.0), Some(owner.1));
            step(given, "owner of the standard streams")?;
        }
    }
    Ok(())
}

fn is_pipe(stream: &OwnedFd) -> Result<bool, Failure> {
    let stat = step(rustix::fs::fstat(stream), "standard streams")?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo)
}

/// Becomes user 0 of the user namespace that was just entered.
pub fn become_root() -> Result<(), Failure> {
    become_user(&User::default())
}

fn terminal(process: &Process, user: &User) -> Result<OwnedFd, Failure> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master =
        step(rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty()), "terminal: /dev/pts/ptmx")?;
    step(rustix::pty::unlockpt(&master), "terminal")?;
    let peer = rustix::pty::OpenptFlags::RDWR
        | rustix::pty::OpenptFlags::NOCTTY
        | rustix::pty::OpenptFlags::CLOEXEC;
    let slave = step(rustix::pty::ioctl_tiocgptpeer(&master, peer), "terminal")?;
    let owner = (rustix::fs::Uid::from_raw(user.uid), rustix::fs::Gid::from_raw(TTY_GROUP));
    step(rustix::fs::fchown(&slave, Some(owner.0), Some(owner.1)), "terminal's owner")?;
    step(rustix::fs::fchmod(&slave, Mode::from_raw_mode(0o620)), "terminal's mode")?;
    if let Some((width, height)) = process.window {
        let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        step(rustix::termios::tcsetwinsize(&master, size), "terminal's size")?;
    }
    for number in 0..3 {
        step(exec::set_stdio(slave.as_fd(), number), "terminal")?;
    }
    step(rustix::process::ioctl_tiocsctty(&slave), "controlling terminal")?;
    Ok(master)
}

/// Makes the terminal on standard input the container's /dev/console.
pub fn bind_console() -> Result<(), Failure> {
    let name = step(rustix::termios::ttyname(rustix::stdio::stdin(), Vec::new()), "console")?;
    step(fs::File::create("/dev/console"), "/dev/console")?;
    step(rustix::mount::mount_bind(name.as_c_str(), "/dev/console"), "/dev/console")
}

/// Becomes the program; comes back only when that failed.
pub fn become_program(
    process: &Process,
    user: &User,
    filter: Option<&[u8]>,
) -> Result<Infallible, Failure> {
    let env = environment(process, user);
    for limit in &process.rlimits {
        let (resource, value) = rlimit(limit)?;
        step(rustix::process::setrlimit(resource, value), format_args!("limit {}", limit.name))?;
    }
    step(exec::close_on_exec_from(3), "close_range")?;
    step(exec::reset_signals(), "signals")?;
    match exec::new_session_keyring() {
        // A kernel without keyrings, or a user without quota: nothing is inherited either way.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOSYS | Errno::DQUOT)) => {
        }
        result => step(result, "session keyring")?,
    }
    let cwd = &process.cwd;
    let inside = rustix::process::chdir(cwd);

    limit_bounding_set(process.capabilities.bounding)?;
    step(rustix::thread::set_keep_capabilities(true), "keep capabilities")?;
    become_user(user)?;
    step(rustix::thread::set_keep_capabilities(false), "keep capabilities")?;
    // Without no_new_privs only an administrator may install a filter, so the power stays until
    // that is done; between the filter and exec stand two calls.
    let filter_first = filter.is_some() && !process.no_new_privileges;
    set_capabilities(
        process,
        if filter_first { CapabilitySet::SYS_ADMIN } else { CapabilitySet::empty() },
    )?;
    if inside.is_err() {
        // Some folders only their owner may enter, not even root.
        rustix::process::chdir(cwd).map_err(|errno| Failure {
            kind: FailureKind::PermissionDenied,
            message: format!("working directory {}: {}", cwd.display(), text(&errno.into())),
        })?;
    }
    rustix::process::umask(Mode::from_raw_mode(process.umask & 0o777));
    let command = process.args.first().ok_or_else(|| invalid("no command given"))?;
    let path = look_up(command, &env)?;
    let path_c = c_string(path.as_os_str().as_encoded_bytes().to_vec())?;
    let args = process
        .args
        .iter()
        .map(|a| c_string(a.clone().into_bytes()))
        .collect::<Result<Vec<_>, _>>()?;
    let env = env.into_iter().map(|e| c_string(e.into_bytes())).collect::<Result<Vec<_>, _>>()?;
    let args: Vec<_> = args.iter().map(CString::as_c_str).collect();
    let env: Vec<_> = env.iter().map(CString::as_c_str).collect();

    if process.no_new_privileges {
        step(rustix::thread::set_no_new_privs(true), "no_new_privs")?;
    }
    if !filter_first {
        raise_ambient(process.capabilities.ambient)?;
    }
    if let Some(filter) = filter {
        step(seccomp::install(filter, process.seccomp_flags), "seccomp filter")?;
    }
    if filter_first {
        set_capabilities(process, CapabilitySet::empty())?;
        raise_ambient(process.capabilities.ambient)?;
    }
    match exec::execve(&path_c, &args, &env) {
        Ok(never) => Ok(never),
        Err(error) => Err(exec_failure(&path, &error)),
    }
}

/// Leaves every group, user and capability behind, as user and group `nobody`.
pub fn drop_everything(nobody: u32) -> Result<(), Failure> {
    let nobody = User { uid: nobody, gid: nobody, groups: Vec::new() };
    limit_bounding_set(0)?;
    become_user(&nobody)?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    step(rustix::thread::set_capabilities(None, sets), "capabilities")?;
    step(rustix::thread::set_no_new_privs(true), "no_new_privs")
}

fn environment(process: &Process, user: &User) -> Vec<String> {
    let mut env = process.env.clone();
    let lacks = |name| !process.env.iter().any(|variable| variable.starts_with(name));
    if lacks("HOME=") {
        env.push(format!("HOME={}", users::home(user.uid)));
    }
    if process.terminal && lacks("TERM=") {
        env.push("TERM=xterm".to_owned());
    }
    env
}

fn become_user(user: &User) -> Result<(), Failure> {
    let groups: Vec<_> = user.groups.iter().map(|gid| rustix::fs::Gid::from_raw(*gid)).collect();
    let (uid, gid) = (rustix::fs::Uid::from_raw(user.uid), rustix::fs::Gid::from_raw(user.gid));
    step(rustix::thread::set_thread_groups(&groups), format_args!("groups {:?}", user.groups))?;
    step(rustix::thread::set_thread_res_gid(gid, gid, gid), format_args!("gid {}", user.gid))?;
    step(rustix::thread::set_thread_res_uid(uid, uid, uid), format_args!("uid {}", user.uid))
}

fn limit_bounding_set(keep: u64) -> Result<(), Failure> {
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            // The first number that this kernel does not know.
            Err(Errno::INVAL) => break,
            Ok(true) if keep & 1 << number == 0 => {
                step(
                    rustix::thread::remove_capability_from_bounding_set(capability),
                    format_args!("bounding set without capability {number}"),
                )?;
            }
            result => {
                step(result, "bounding set")?;
            }
        }
    }
    Ok(())
}

fn set_capabilities(process: &Process, and: CapabilitySet) -> Result<(), Failure> {
    let sets = &process.capabilities;
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(sets.effective) | and,
        permitted: CapabilitySet::from_bits_retain(sets.permitted) | and,
        inheritable: CapabilitySet::from_bits_retain(sets.inheritable),
    };
    step(rustix::thread::set_capabilities(None, sets), "capabilities")
}

fn raise_ambient(ambient: u64) -> Result<(), Failure> {
    for number in (0..64).filter(|number| ambient & 1 << number != 0) {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        step(
            rustix::thread::configure_capability_in_ambient_set(capability, true),
            format_args!("ambient capability {number}"),
        )?;
    }
    Ok(())
}

fn rlimit(limit: &crate::plan::Rlimit) -> Result<(Resource, Rlimit), Failure> {
    let resource = match limit.name.as_str() {
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_STACK" => Resource::Stack,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        name => return Err(invalid(format!("limit {name} is not known"))),
    };
    let bound = |value: u64| (value != u64::MAX).then_some(value);
    Ok((resource, Rlimit { current: bound(limit.soft), maximum: bound(limit.hard) }))
}

fn c_string(bytes: Vec<u8>) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| invalid("a zero byte in the command or its environment"))
}

/// The file to execute, in the words other runtimes use when there is none.
fn look_up(command: &str, env: &[String]) -> Result<PathBuf, Failure> {
    if command.contains('/') {
        return executable(Path::new(command)).map(|()| PathBuf::from(command)).map_err(|errno| {
            let path = Path::new(command);
            match errno {
                Errno::NOENT | Errno::NOTDIR => Failure {
                    kind: FailureKind::NotFound,
                    message: format!(
                        "exec: {command:?}: stat {}: {}",
                        path.display(),
                        text(&errno.into())
                    ),
                },
                _ => denied(format!("exec: {command:?}: {}", text(&errno.into()))),
            }
        });
    }
    let not_found = || Failure {
        kind: FailureKind::NotFound,
        message: format!("exec: {command:?}: executable file not found in $PATH"),
    };
    if command.is_empty() {
        return Err(not_found());
    }
    let path = env
        .iter()
        .rev()
        .find_map(|variable| variable.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut refused = None;
    for folder in path.split(':') {
        let candidate = Path::new(if folder.is_empty() { "." } else { folder }).join(command);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::ACCESS | Errno::PERM) => refused = Some(candidate),
            Err(_) => {}
        }
    }
    Err(match refused {
        Some(_) => denied(format!("exec: {command:?}: permission denied")),
        None => not_found(),
    })
}

fn denied(message: String) -> Failure {
    Failure { kind: FailureKind::PermissionDenied, message }
}

fn executable(path: &Path) -> Result<(), Errno> {
    let stat = rustix::fs::stat(path)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory {
        return Err(Errno::ISDIR);
    }
    if stat.st_mode & 0o111 == 0 {
        return Err(Errno::ACCESS);
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

fn exec_failure(path: &Path, error: &io::Error) -> Failure {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => FailureKind::NotFound,
        io::ErrorKind::PermissionDenied => FailureKind::PermissionDenied,
        _ => FailureKind::Invalid,
    };
    Failure { kind, message: format!("exec {}: {}", path.display(), text(error)) }
}
