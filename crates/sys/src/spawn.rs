//! Starting a child with exactly the descriptors, identity and fate it is given.
//!
//! Everything not in the map is closed on exec. The order inside the child matters: the death
//! signal is cleared by a change of user, so it is set last; capabilities go with the user.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
};

/// A child to be.
#[derive(Debug)]
pub struct Spawn {
    /// The program's file.
    pub program: PathBuf,
    /// Its arguments, without its name.
    pub args: Vec<OsString>,
    /// Descriptors the child gets, and under which number (3 and up, each once).
    pub fds: Vec<(OwnedFd, RawFd)>,
    /// Where standard output and error go; `None`: /dev/null. Standard input is /dev/null.
    pub output: Option<OwnedFd>,
    /// Leads a session of its own, so that no terminal's or group's signal reaches it.
    pub session: bool,
    /// Signal the child gets when the *thread* that started it ends; call from the main thread.
    pub death_signal: Option<i32>,
    /// Runs as this user and group, without capabilities, in these further groups.
    pub identity: Option<Identity>,
    /// No transparent huge pages: a clone's private memory stays small.
    pub no_huge_pages: bool,
    /// Files the child writes its own pid to before exec (`cgroup.procs`), already open.
    pub cgroups: Vec<OwnedFd>,
}

/// Who a child runs as.
#[derive(Debug, Clone)]
pub struct Identity {
    /// User and group id.
    pub uid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

impl Spawn {
    /// A child of `program` that inherits nothing.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            fds: Vec::new(),
            output: None,
            session: false,
            death_signal: None,
            identity: None,
            no_huge_pages: false,
            cgroups: Vec::new(),
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl Into<OsString>) -> &mut Self {
        self.args.push(arg.into());
        self
    }

    /// Gives the child `fd` as number `target`.
    pub fn fd(&mut self, fd: impl Into<OwnedFd>, target: RawFd) -> &mut Self {
        self.fds.push((fd.into(), target));
        self
    }

    /// Starts it. The descriptors are closed in this process afterwards.
    ///
    /// # Errors
    /// What fork, the steps in the child, or exec said.
    pub fn start(self) -> io::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::null());
        match &self.output {
            Some(file) => command.stdout(file.try_clone()?).stderr(file.try_clone()?),
            None => command.stdout(Stdio::null()).stderr(Stdio::null()),
        };
        let parent = std::process::id();
        // SAFETY: `in_child` makes system calls only on memory allocated before the fork.
        unsafe { command.pre_exec(move || self.in_child(parent)) };
        command.spawn()
    }

    fn in_child(&self, parent: u32) -> io::Result<()> {
        if self.session {
            // SAFETY: no arguments.
            check(unsafe { libc::setsid() })?;
        }
        for cgroup in &self.cgroups {
            // SAFETY: the buffer is one byte long; "0" stands for the writer.
            check(unsafe { libc::write(cgroup.as_raw_fd(), b"0".as_ptr().cast(), 1) } as i32)?;
        }
        self.place_fds()?;
        if self.no_huge_pages {
            // SAFETY: PR_SET_THP_DISABLE takes plain numbers.
            check(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) })?;
        }
        if let Some(identity) = &self.identity {
            become_user(identity)?;
        }
        if let Some(signal) = self.death_signal {
            // SAFETY: plain numbers.
            check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) })?;
            // SAFETY: no arguments. A parent that died before the line above sends nothing.
            if unsafe { libc::getppid() } as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
        Ok(())
    }

    /// Moves every descriptor to its number and marks all others close-on-exec.
    fn place_fds(&self) -> io::Result<()> {
        let above = self.fds.iter().map(|(_, target)| target + 1).max().unwrap_or(3);
        // First above all targets, so that no target overwrites a source.
        let mut parked = [0; MAX_FDS];
        if self.fds.len() > MAX_FDS {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        for (slot, (fd, _)) in parked.iter_mut().zip(&self.fds) {
            // SAFETY: plain numbers.
            *slot = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, above) })?;
        }
        // SAFETY: plain numbers; std's own exec-error pipe is close-on-exec already.
        check(unsafe {
            libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32)
        })?;
        for (slot, (_, target)) in parked.iter().zip(&self.fds) {
            // SAFETY: plain numbers; dup2 clears close-on-exec. std's pipe may hold `target`:
            // then an exec error is reported as success and seen as the child's end.
            check(unsafe { libc::dup2(*slot, *target) })?;
        }
        Ok(())
    }
}

/// More than any child of ours is given.
const MAX_FDS: usize = 16;

fn become_user(identity: &Identity) -> io::Result<()> {
    // SAFETY: the pointer and the length belong to one live slice.
    check(unsafe { libc::setgroups(identity.groups.len(), identity.groups.as_ptr()) })?;
    let id = identity.uid;
    // SAFETY: plain numbers. Leaving uid 0 also empties the capability sets.
    check(unsafe { libc::setresgid(id, id, id) })?;
    // SAFETY: plain numbers.
    check(unsafe { libc::setresuid(id, id, id) })?;
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    Ok(())
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, io::Read};

    fn output_of(mut spawn: Spawn) -> String {
        let (mut reader, writer) = io::pipe().unwrap();
        spawn.output = Some(writer.into());
        let mut child = spawn.start().unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        child.wait().unwrap();
        text
    }

    fn shell(script: &str) -> Spawn {
        let mut spawn = Spawn::new("/bin/sh");
        spawn.arg("-c").arg(script);
        spawn
    }

    #[test]
    fn a_child_has_the_descriptors_it_was_given_and_no_others() {
        let leaked = File::open("/etc/passwd").unwrap();
        // SAFETY: a plain number; the flag is cleared so that only `place_fds` can stop the leak.
        unsafe { libc::fcntl(leaked.as_raw_fd(), libc::F_SETFD, 0) };
        let mut spawn = shell("ls /proc/self/fd | tr '\\n' ' '; readlink /proc/self/fd/4");
        spawn.fd(File::open("/dev/null").unwrap(), 3);
        spawn.fd(File::open("/dev/zero").unwrap(), 4);
        // ls itself opens the folder: one more than 0 to 4.
        assert_eq!(output_of(spawn), "0 1 2 3 4 5 /dev/zero\n");
    }

    #[test]
    fn descriptors_may_be_swapped() {
        let (a, b) = (File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap());
        let (to_b, to_a) = (b.as_raw_fd(), a.as_raw_fd());
        let mut spawn = shell(&format!("readlink /proc/self/fd/{to_b} /proc/self/fd/{to_a}"));
        spawn.fd(a, to_b).fd(b, to_a);
        assert_eq!(output_of(spawn), "/dev/null\n/dev/zero\n");
    }

    #[test]
    fn another_user_has_no_capabilities_and_gains_none() {
        let mut spawn = shell("id -u; id -g; id -G; grep -E 'CapEff|NoNewPrivs' /proc/self/status");
        spawn.identity = Some(Identity { uid: 12345, groups: vec![7] });
        spawn.death_signal = Some(libc::SIGKILL);
        let text = output_of(spawn);
        assert_eq!(text, "12345\n12345\n12345 7\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n");
    }
}
