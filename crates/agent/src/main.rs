//! `a3s-box-agent`: runs a sandbox's containers.
//!
//! Without arguments it is PID 1 of a guest: it mounts what the guest has and serves the calls of
//! `proto/agent.proto` on the virtio-serial port `agent`. With `--socket FD` it is an ordinary
//! process of the node that serves them on an inherited socket, in folders and namespaces given on the
//! command line, and ends with the connection.
//!
//! Two processes: the *launcher*, forked before anything has threads, makes every container's and
//! exec's process; the *agent* reaps them and serves, on one thread (but for the bytes of [`lanes`]).
//! Start reading in [`rpc`], [`container`] and, on the other side of the fork, [`child`].

mod agent;
mod attach;
mod boot;
mod cgroup;
mod child;
mod config;
mod container;
mod details;
mod device_rules;
mod disks;
mod error;
mod events;
mod exec;
mod huge_pages;
mod lanes;
mod launcher;
mod layers;
mod limits;
mod log;
mod mounts;
mod network;
mod plan;
mod pod_limit;
mod port;
mod port_forward;
mod process;
mod processors;
mod reaper;
mod rootfs;
mod rpc;
mod sandbox;
mod seccomp_filter;
mod serve;
mod spawn;
mod spec;
mod stats;
mod streams;
mod user_namespace;
mod users;
mod volume_mounts;
mod watcher;

use a3s_box_sys::{clone3, duplex::Duplex, inherit};
use agent::Agent;
use config::{Boundary, Config};
use error::{Error, Step};
use rustix::{
    fd::AsFd,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use std::{ffi::OsString, fs, process::ExitCode, sync::Arc};

const USAGE: &str = "\
usage: a3s-box-agent --socket FD --share DIR --scratch DIR --runtime DIR --cgroups DIR
                     [--cgroup-v1 CONTROLLER=DIR]... [--own ipc|uts]... [--netns FD]
                     [--node-mounts FD]
       a3s-box-agent            (as PID 1 of a guest)
       a3s-box-agent rehearse [stay|listen]

--cgroups    folder of a cgroup v2 for the containers' cgroups
--cgroup-v1  the same in the v1 hierarchy of a controller
--own        a namespace that is made for the pod; it shares the others with the caller
--netns      the pod's network namespace, which is joined
--node-mounts  the node's mount namespace, for volumes whose mounts go both ways
rehearse     what the containers run of a guest that waits for its pod: one line, and with `stay` no end, or
             with `listen` not before a line has come";
/// Of an agent beside the node's other processes: containers are killed for want of memory before it.
const OOM_SCORE: &str = "-998";
/// Open files of a process in a guest: as many as the kernel has for one.
const OPEN_FILES: u64 = 1 << 20;
/// EX_USAGE.
const BAD_USAGE: u8 = 64;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "rehearse") {
        return rehearse(args.get(1).and_then(|arg| arg.to_str()));
    }
    let result = if rustix::process::getpid().is_init() && args.iter().all(|arg| arg != "--socket")
    {
        // The kernel's own words on the command line are not ours.
        guest()
    } else {
        match parse(args) {
            Some((inherited, config)) => socket(&inherited, config),
            None => {
                log::error(format_args!("{USAGE}"));
                return ExitCode::from(BAD_USAGE);
            }
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // In a guest the kernel panics now, and the console ends with this line.
        Err(error) => {
            log::error(format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}

/// The whole life of a rehearsal's process.
fn rehearse(then: Option<&str>) -> ExitCode {
    println!("rehearsed");
    match then {
        Some("stay") => loop {
            std::thread::park();
        },
        Some("listen") => match std::io::stdin().read_line(&mut String::new()) {
            Ok(1..) => ExitCode::SUCCESS,
            Ok(0) | Err(_) => ExitCode::FAILURE,
        },
        _ => ExitCode::SUCCESS,
    }
}

/// Descriptors from the command line.
struct Inherited {
    socket: i32,
    netns: Option<i32>,
    mounts: Option<i32>,
}

fn parse(args: Vec<OsString>) -> Option<(Inherited, Config)> {
    let mut args = args.into_iter();
    let mut config = Config { boundary: Boundary::Host, namespaces: 0, ..Config::guest() };
    let (mut socket, mut netns, mut mounts) = (None, None, None);
    while let Some(name) = args.next() {
        let value = args.next()?;
        match name.to_str()? {
            "--socket" => socket = Some(value.to_str()?.parse().ok()?),
            "--node-mounts" => mounts = Some(value.to_str()?.parse().ok()?),
            "--share" => config.share = value.into(),
            "--scratch" => config.scratch = value.into(),
            "--runtime" => config.runtime = value.into(),
            "--cgroups" => config.cgroups = value.into(),
            "--cgroup-v1" => {
                let (controller, folder) = value.to_str()?.split_once('=')?;
                config.cgroups_v1.insert(controller.to_owned(), folder.into());
            }
            "--own" => {
                config.namespaces |= match value.to_str()? {
                    "ipc" => clone3::namespace::IPC,
                    "uts" => clone3::namespace::UTS,
                    _ => return None,
                }
            }
            "--netns" => {
                netns = Some(value.to_str()?.parse().ok()?);
                config.namespaces |= clone3::namespace::NET;
            }
            _ => return None,
        }
    }
    Some((Inherited { socket: socket?, netns, mounts }, config))
}

/// One thread for everything; a few more for what blocks.
fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(8)
        .thread_stack_size(256 << 10)
        .build()
        .step("runtime")
}

/// Sessions take up to ten descriptors each. Containers inherit the limit: it is what they have with
/// other runtimes.
fn raise_open_files(most: Option<u64>) -> Result<(), Error> {
    let most = most.or_else(|| getrlimit(Resource::Nofile).maximum);
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).step("limit of open files")
}

fn guest() -> Result<(), Error> {
    raise_open_files(Some(OPEN_FILES))?;
    let config = Config::guest();
    boot::early(&config)?;
    boot::devices(&config)?;
    let (launcher, ()) = launcher::fork(()).step("launcher")?;
    boot::share(&config)?;
    let port = port::open("agent").step("agent port")?;
    let port =
        port.ok_or_else(|| Error::NotNow("the machine has no port named agent".to_owned()))?;
    runtime()?.block_on(async {
        let agent = Agent::start(config, launcher, None)?;
        let port = port::Port::new(port).step("agent port")?;
        log::info(format_args!("ready"));
        loop {
            let connection = port.connect().await.step("agent port")?;
            if let Err(error) = serve::serve(&agent, connection).await {
                log::info(format_args!("connection: {error}"));
            }
        }
    })
}

fn socket(inherited: &Inherited, config: Config) -> Result<(), Error> {
    raise_open_files(None)?;
    let socket = inherit::take(inherited.socket).step("inherited socket")?;
    // Before the launcher is forked, so that every process of the pod is born in them.
    if let Some(netns) = inherited.netns {
        let netns = inherit::take(netns).step("inherited network namespace")?;
        clone3::join(netns.as_fd(), clone3::namespace::NET).step("join the network namespace")?;
    }
    clone3::unshare(config.namespaces & !clone3::namespace::NET).step("the pod's namespaces")?;
    if let Err(error) = fs::write("/proc/self/oom_score_adj", OOM_SCORE) {
        log::info(format_args!("oom_score_adj stays: {error}"));
    }
    let node_mounts = inherited.mounts.map(inherit::take).transpose();
    let node_mounts = node_mounts.step("inherited mount namespace")?;
    let (launcher, (socket, node_mounts)) =
        launcher::fork((socket, node_mounts)).step("launcher")?;
    runtime()?.block_on(async {
        let agent = Agent::start(config, launcher, node_mounts)?;
        let socket = Duplex::new(socket).step("inherited socket")?;
        if let Err(error) = serve::serve(&agent, socket).await {
            log::info(format_args!("connection: {error}"));
        }
        end(&agent).await
    })
}

/// Leaves nothing behind. Every step is tried; the first failure is told.
async fn end(agent: &Arc<Agent>) -> Result<(), Error> {
    let mut results = Vec::new();
    for id in agent.ids() {
        results.push(container::remove(agent, &id).await);
    }
    if let Some(sandbox) = agent.sandbox.get() {
        let detach = rustix::mount::UnmountFlags::DETACH;
        results.push(rustix::mount::unmount(agent.config.shm(), detach).step("unmount shm"));
        if let Some(pause) = &sandbox.pid_namespace {
            results.push(a3s_box_sys::pidfd::kill(pause).step("end the pause process"));
        }
    }
    results.into_iter().collect()
}
