//! A child of the launcher, from its first instruction to exec. It shares nothing with the agent
//! but a control socket: up go [`Report`]s, down comes one byte, the word to exec. When exec
//! succeeds the socket closes by itself.

use crate::{
    launcher::{self, Descriptors},
    network,
    plan::{
        ContainerPlan, ExecPlan, Failure, FailureKind, IdMap, Inner, Plan, PodPlan, Process,
        Report, ServePlan, User,
    },
    process, rootfs, users,
};
use a3s_box_sys::{
    clone3::{self, Clone3, Cloned, SingleThreaded, namespace},
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
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
};

/// The byte that lets a child exec.
pub const GO: u8 = b'g';

/// The namespaces that belong to the pod's user namespace, besides its PID namespace.
pub const OWNED_BY_POD: u64 = namespace::NET | namespace::IPC | namespace::UTS;
/// Nobody's user and group id.
const NOBODY: u32 = 65534;

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
    match plan {
        Plan::Pause(pod) => pause(control, pod.as_ref()),
        Plan::Serve(plan) => {
            let stream = step(descriptors.stdio[0].take().ok_or_else(missing), "stream")?;
            serve(control, &plan, stream)
        }
        Plan::Container(plan) => {
            oom_score(plan.process.oom_score_adj)?;
            enter_cgroups(&plan.cgroup_doors)?;
            if plan.inner.is_none() {
                own_cgroups()?;
            }
            let node_mounts = descriptors.node_mounts.take();
            let user_namespace = descriptors.user_namespace.take();
            let taken = rootfs::take(
                &plan,
                node_mounts.as_ref().map(AsFd::as_fd),
                user_namespace.as_ref().map(AsFd::as_fd),
            )?;
            drop(node_mounts);
            if let Some(inner) = &plan.inner {
                process::give_stdio(&descriptors.stdio, inner.ids.uid, inner.ids.gid)?;
                let pod = step(descriptors.target.take().ok_or_else(missing), "pod")?;
                let pid_namespace = descriptors.pid_namespace.take();
                go_inside(control, pod.as_fd(), inner, pid_namespace.as_ref().map(AsFd::as_fd))?;
            }
            let user = container(&plan, taken)?;
            let master = process::take_stdio(&descriptors.stdio, &plan.process, &user)?;
            if master.is_some() {
                process::bind_console()?;
            }
            ready(control, master, &plan.process, &user, seccomp.as_deref())
        }
        Plan::Exec(plan) => {
            let target = step(descriptors.target.take().ok_or_else(missing), "container")?;
            join(target.as_fd(), &plan, &descriptors.stdio)?;
            let master = process::take_stdio(&descriptors.stdio, &plan.process, &plan.user)?;
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

/// Goes on as a child, made in the pod's user namespace and the namespaces it owns. Only there may
/// it make a mount namespace that the container may change, and nothing of the guest is its any more.
fn go_inside(
    control: BorrowedFd<'_>,
    pod: BorrowedFd<'_>,
    inner: &Inner,
    pid_namespace: Option<BorrowedFd<'_>>,
) -> Result<(), Failure> {
    let what = "enter the pod's user namespace";
    let proof = step(SingleThreaded::check(), what)?;
    let mut namespaces = namespace::MOUNT | inner.namespaces;
    match pid_namespace {
        // Before the right to look at another process is gone.
        Some(other) => step(clone3::join(other, namespace::PID), "enter the PID namespace")?,
        None => namespaces |= namespace::PID,
    }
    step(clone3::join(pod, namespace::USER | OWNED_BY_POD), what)?;
    process::become_root()?;
    let wish = Clone3 { namespaces, sibling: true, cgroup: None };
    match step(clone3::clone3(&proof, &wish), what)? {
        Cloned::Parent { pid, pidfd } => {
            step(report(control, &Report::Child(pid as i32), Some(pidfd.as_fd())), "report")?;
            exit(0)
        }
        Cloned::Child => step(rustix::process::setsid(), "setsid").map(drop),
    }
}

/// Makes this process's cgroup the root of what it sees; what is mounted of cgroups before shows the
/// guest's.
fn own_cgroups() -> Result<(), Failure> {
    step(clone3::unshare(namespace::CGROUP), "cgroup namespace")
}

/// Builds the container around this process.
fn container(plan: &ContainerPlan, taken: rootfs::Taken) -> Result<User, Failure> {
    if plan.inner.is_some() {
        own_cgroups()?;
    }
    if let Some(name) = &plan.hostname {
        step(rustix::system::sethostname(name.as_bytes()), format_args!("hostname {name:?}"))?;
    }
    if let Some(name) = &plan.domainname {
        step(rustix::system::setdomainname(name.as_bytes()), format_args!("domain name {name:?}"))?;
    }
    if plan.loopback {
        step(network::loopback_up(), "loopback")?;
    }
    rootfs::enter(plan, taken)?;
    set_sysctls(&plan.sysctls)?;
    rootfs::protect(plan)?;
    let user = users::resolve(&plan.user)?;
    if let Some(inner) = &plan.inner {
        is_mapped(&user, inner.ids)?;
    }
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

fn set_sysctls(sysctls: &[(String, String)]) -> Result<(), Failure> {
    for (name, value) in sysctls {
        crate::sandbox::set_sysctl(Path::new("/proc/sys"), name, value)
            .map_err(|e| invalid(e.to_string()))?;
    }
    Ok(())
}

/// The kernel knows no others inside.
fn is_mapped(user: &User, ids: IdMap) -> Result<(), Failure> {
    let all = [user.uid, user.gid].into_iter().chain(user.groups.iter().copied());
    match all.max().filter(|id| *id >= ids.length) {
        None => Ok(()),
        Some(id) => Err(invalid(format!(
            "user or group {id} is outside the pod's user namespace, which has ids 0 to {}",
            ids.length - 1
        ))),
    }
}

fn join(
    target: BorrowedFd<'_>,
    plan: &ExecPlan,
    stdio: &[Option<OwnedFd>; 3],
) -> Result<(), Failure> {
    oom_score(plan.process.oom_score_adj)?;
    enter_cgroups(&plan.cgroup_doors)?;
    if let Some(ids) = plan.ids {
        process::give_stdio(stdio, ids.uid, ids.gid)?;
    }
    step(clone3::join(target, plan.namespaces), "join the container's namespaces")?;
    if plan.ids.is_some() {
        process::become_root()?;
    }
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
    wait_for_word(control)?;
    process::become_program(process, user, seccomp)
}

/// Waits for the agent's word; when that never comes, this process ends.
fn wait_for_word(control: BorrowedFd<'_>) -> Result<(), Failure> {
    let mut word = [0];
    let (length, _) =
        step(launcher::receive(control, &mut word, RecvFlags::empty()), "wait for the word")?;
    if length == 0 || word != [GO] {
        exit(1);
    }
    Ok(())
}

fn report(control: BorrowedFd<'_>, report: &Report, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let fds: Vec<_> = fd.into_iter().collect();
    launcher::send(control, &serde_json::to_vec(report)?, &fds)
}

/// Serves a mount to the host, until the host hangs up.
fn serve(
    control: BorrowedFd<'_>,
    plan: &ServePlan,
    stream: OwnedFd,
) -> Result<std::convert::Infallible, Failure> {
    step(rustix::thread::set_name(c"mount-server"), "name")?;
    rootfs::show_alone(&plan.mount, &plan.staging)?;
    step(report(control, &Report::Ready(User::default()), None), "report")?;
    let stream = UnixStream::from(stream);
    if let Err(error) = a3s_box_volume::serve_mount(&plan.staging, stream) {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        let cause = cause.unwrap_or_default();
        crate::log::error(format_args!("serve {}: {error}{cause}", plan.mount.display()));
        exit(1)
    }
    exit(0)
}

/// Holds namespaces: reaps what falls to it, sees nothing, can do nothing.
fn pause(
    control: BorrowedFd<'_>,
    pod: Option<&PodPlan>,
) -> Result<std::convert::Infallible, Failure> {
    exec::reap_automatically();
    step(rustix::thread::set_name(c"pause"), "name")?;
    let mut nobody = NOBODY;
    if let Some(PodPlan { ids, hostname, sysctls }) = pod {
        // Until the agent has mapped its ids and given it a network.
        wait_for_word(control)?;
        process::become_root()?;
        let what = format_args!("hostname {hostname:?}");
        step(rustix::system::sethostname(hostname.as_bytes()), what)?;
        set_sysctls(sysctls)?;
        nobody = nobody.min(ids.length - 1);
    }
    // Whoever may look through /proc/1/root of the pod finds an empty folder.
    rootfs::enter_empty(Path::new("/proc"))?;
    process::drop_everything(nobody)?;
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
