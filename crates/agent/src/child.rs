//! A child of the launcher, from its first instruction to exec. It shares nothing with the agent
//! but a control socket: up go [`Report`]s, down comes one byte, the word to exec. When exec
//! succeeds the socket closes by itself.

use crate::{
    launcher::{self, Descriptors},
    network,
    plan::{ContainerPlan, ExecPlan, Failure, FailureKind, Plan, Process, Report, User},
    process, rootfs, users,
};
use a3s_box_sys::{
    clone3::{self, namespace},
    exec,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    net::RecvFlags,
};
use std::{
    fmt::Display,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// The byte that lets a child exec.
pub const GO: u8 = b'g';

/// Ends this process, and nothing of the agent's with it.
pub fn exit(code: i32) -> ! {
    exec::exit(code)
}

/// Names the step that failed.
pub fn step<T>(result: Result<T, impl Into<io::Error>>, what: impl Display) -> Result<T, Failure> {
    result.map_err(|error| {
        let error = error.into();
        Failure { kind: FailureKind::Internal, message: format!("{what}: {}", text(&error)) }
    })
}

/// A failure that the request is to blame for.
pub fn invalid(message: impl Into<String>) -> Failure {
    Failure { kind: FailureKind::Invalid, message: message.into() }
}

/// An error in the kernel's words, as other runtimes print it: lower case, no number.
pub fn text(error: &io::Error) -> String {
    let full = error.to_string();
    let words = full.split(" (os error").next().unwrap_or(&full);
    let mut letters = words.chars();
    match (error.raw_os_error(), letters.next()) {
        (Some(_), Some(first)) => first.to_lowercase().chain(letters).collect(),
        _ => full,
    }
}

/// Does what the plan says; ends in exec or exit.
pub fn run(mut descriptors: Descriptors) -> ! {
    let Some(control) = descriptors.control.take() else { exit(1) };
    let error = match work(control.as_fd(), descriptors) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    if let Err(error) = report(control.as_fd(), &Report::Failed(error), None) {
        crate::log::error(format_args!("child: report: {error}"));
    }
    exit(1)
}

fn work(
    control: BorrowedFd<'_>,
    mut descriptors: Descriptors,
) -> Result<std::convert::Infallible, Failure> {
    let missing = || io::Error::from(io::ErrorKind::InvalidInput);
    let plan = step(descriptors.plan.take().ok_or_else(missing), "plan")?;
    let plan: Plan =
        step(read(plan).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?)), "plan")?;
    let seccomp = descriptors.seccomp.take().map(read).transpose();
    let seccomp = step(seccomp, "seccomp filter")?;
    step(rustix::process::setsid(), "setsid")?;
    let stdio = &descriptors.stdio;
    match plan {
        Plan::Pause => pause(control),
        Plan::Container(plan) => {
            let node_mounts = descriptors.node_mounts.take();
            let user = container(&plan, node_mounts.as_ref().map(OwnedFd::as_fd))?;
            drop(node_mounts);
            let master = process::take_stdio(stdio, &plan.process, &user)?;
            if master.is_some() {
                process::bind_console()?;
            }
            ready(control, master, &plan.process, &user, seccomp.as_deref())
        }
        Plan::Exec(plan) => {
            let target = step(descriptors.target.take().ok_or_else(missing), "container")?;
            join(target.as_fd(), &plan)?;
            let master = process::take_stdio(stdio, &plan.process, &plan.user)?;
            ready(control, master, &plan.process, &plan.user, seccomp.as_deref())
        }
    }
}

/// Reads without moving the offset, which other children share.
fn read(memfd: OwnedFd) -> io::Result<Vec<u8>> {
    let file = File::from(memfd);
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Builds the container around this process.
fn container(plan: &ContainerPlan, node_mounts: Option<BorrowedFd<'_>>) -> Result<User, Failure> {
    oom_score(plan.process.oom_score_adj)?;
    enter_cgroups(&plan.cgroup_doors)?;
    // Only now is the new cgroup this process's, and so the root of the namespace.
    step(clone3::unshare(namespace::CGROUP), "cgroup namespace")?;
    if let Some(name) = &plan.hostname {
        step(rustix::system::sethostname(name.as_bytes()), format_args!("hostname {name:?}"))?;
    }
    if let Some(name) = &plan.domainname {
        step(rustix::system::setdomainname(name.as_bytes()), format_args!("domain name {name:?}"))?;
    }
    if plan.loopback {
        step(network::loopback_up(), "loopback")?;
    }
    rootfs::enter(plan, node_mounts)?;
    for (name, value) in &plan.sysctls {
        crate::sandbox::set_sysctl(Path::new("/proc/sys"), name, value)
            .map_err(|e| invalid(e.to_string()))?;
    }
    rootfs::protect(plan)?;
    let user = users::resolve(&plan.user)?;
    let cwd = &plan.process.cwd;
    if !cwd.is_absolute() {
        return Err(invalid(format!("working directory {} is not absolute", cwd.display())));
    }
    if !cwd.is_dir() {
        step(std::fs::create_dir_all(cwd), format_args!("working directory {}", cwd.display()))?;
    }
    if plan.readonly_root {
        rootfs::make_root_readonly()?;
    }
    Ok(user)
}

fn join(target: BorrowedFd<'_>, plan: &ExecPlan) -> Result<(), Failure> {
    oom_score(plan.process.oom_score_adj)?;
    enter_cgroups(&plan.cgroup_doors)?;
    step(clone3::join(target, plan.namespaces), "join the container's namespaces")?;
    step(rustix::process::chdir("/"), "chdir /")
}

/// Enters those cgroups that a process cannot be born in.
fn enter_cgroups(doors: &[PathBuf]) -> Result<(), Failure> {
    for door in doors {
        step(std::fs::write(door, "0"), format_args!("enter {}", door.display()))?;
    }
    Ok(())
}

/// Where the machine itself may not lower the score (a runtime in a container), it stays.
fn oom_score(score: i32) -> Result<(), Failure> {
    match std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => step(result, format_args!("oom_score_adj {score}")),
    }
}

/// Reports, waits for the word, and becomes the program.
fn ready(
    control: BorrowedFd<'_>,
    master: Option<OwnedFd>,
    process: &Process,
    user: &User,
    seccomp: Option<&[u8]>,
) -> Result<std::convert::Infallible, Failure> {
    let message = Report::Ready(user.clone());
    step(report(control, &message, master.as_ref().map(OwnedFd::as_fd)), "report")?;
    drop(master);
    let mut word = [0];
    let (length, _) =
        step(launcher::receive(control, &mut word, RecvFlags::empty()), "wait for the start")?;
    if length == 0 || word != [GO] {
        exit(1);
    }
    process::become_program(process, user, seccomp)
}

fn report(control: BorrowedFd<'_>, report: &Report, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds: Vec<_> = fd.into_iter().collect();
    launcher::send(control, &serde_json::to_vec(report)?, &fds)
}

/// Holds a PID namespace: reaps what falls to it, sees nothing, can do nothing.
fn pause(control: BorrowedFd<'_>) -> Result<std::convert::Infallible, Failure> {
    exec::reap_automatically();
    step(rustix::thread::set_name(c"pause"), "name")?;
    // Whoever may look through /proc/1/root of the pod finds an empty folder.
    rootfs::enter_empty(Path::new("/proc"))?;
    process::drop_everything()?;
    // Nothing else would end it if the agent is killed.
    step(
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)),
        "parent's death",
    )?;
    step(report(control, &Report::Ready(User::default()), None), "report")?;
    loop {
        exec::pause();
    }
}
