//! Processes by something better than a number: a pidfd, or a pid with its start time.
//!
//! Pids wrap within minutes on a busy node; a bare one is never signalled.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::{fs, io, os::fd::OwnedFd};

/// A process that may end and whose number may be given to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time: u64,
}

impl Identity {
    /// The identity of a process that exists now.
    ///
    /// # Errors
    /// NotFound when there is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, start_time: start_time(pid)? })
    }

    /// A descriptor of exactly this process; `None` when it is gone.
    ///
    /// # Errors
    /// What the kernel said, but for "no such process".
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(err) => return Err(err.into()),
        };
        // Compared after opening: the descriptor cannot come to mean another process any more.
        match start_time(self.pid) {
            Ok(time) if time == self.start_time => Ok(Some(fd)),
            Ok(_) => Ok(None),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// Whether it runs (a zombie has ended).
    ///
    /// # Errors
    /// As [`Identity::open`].
    pub fn is_alive(&self) -> io::Result<bool> {
        Ok(self.open()?.is_some() && state(self.pid) != Some('Z'))
    }

    /// Ends it with SIGKILL; fine when it is gone already.
    ///
    /// # Errors
    /// What the kernel said, but for "no such process".
    pub fn kill(&self) -> io::Result<()> {
        match self.open()? {
            Some(fd) => kill(&fd),
            None => Ok(()),
        }
    }
}

/// Sends SIGKILL; fine when the process is gone already.
///
/// # Errors
/// What the kernel said, but for "no such process".
pub fn kill(process: &OwnedFd) -> io::Result<()> {
    match pidfd_send_signal(process, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(err) => Err(err.into()),
    }
}

/// A descriptor of a child that has not been reaped, so its number is still its own.
///
/// # Errors
/// What the kernel said.
pub fn of_child(child: &std::process::Child) -> io::Result<OwnedFd> {
    Ok(pidfd_open(Pid::from_child(child), PidfdFlags::NONBLOCK)?)
}

/// The fields of /proc/PID/stat after the command, which may itself hold spaces and brackets.
fn stat(pid: u32) -> io::Result<Vec<String>> {
    let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => {
            return Err(io::ErrorKind::NotFound.into());
        }
        other => other?,
    };
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    Ok(fields.split_whitespace().map(str::to_owned).collect())
}

fn start_time(pid: u32) -> io::Result<u64> {
    stat(pid)?
        .get(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc/PID/stat"))
}

fn state(pid: u32) -> Option<char> {
    stat(pid).ok()?.first()?.chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn only_the_process_that_was_meant_is_killed() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let meant = Identity::of(child.id()).unwrap();
        let stranger = Identity { start_time: meant.start_time + 1, ..meant };
        stranger.kill().unwrap();
        assert!(meant.is_alive().unwrap());
        assert!(!stranger.is_alive().unwrap());
        meant.kill().unwrap();
        child.wait().unwrap();
        assert!(!meant.is_alive().unwrap());
        meant.kill().unwrap();
    }
}
