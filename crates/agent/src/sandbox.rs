//! ConfigureSandbox: makes a freshly cloned guest this pod's.

use crate::{
    agent::{Agent, blocking},
    child::OWNED_BY_POD,
    config::{Boundary, Config},
    error::{Error, Step},
    launcher::Descriptors,
    network,
    plan::{IdMap, Plan, PodPlan},
    user_namespace::UserNamespace,
};
use a3s_box_api::agent::v1 as api;
use a3s_box_sys::clone3::namespace;
use rustix::{
    fd::OwnedFd,
    mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount},
    time::{ClockId, Timespec, clock_settime},
};
use std::{
    ffi::CString,
    fs,
    path::{Component, Path},
    sync::{Arc, PoisonError},
};

const DEFAULT_SHM: u64 = 64 << 20;
/// Less is no secret.
const LEAST_ENTROPY: usize = 32;
const NANOS: i64 = 1_000_000_000;

/// What ConfigureSandbox has made.
#[derive(Debug)]
pub struct Sandbox {
    /// The process that holds the pod's PID namespace, for containers that share it.
    pub pid_namespace: Option<OwnedFd>,
    /// The pod's user namespace; none: it is the guest's.
    pub user_namespace: Option<UserNamespace>,
}

/// Does it, once; a rehearsal may come before.
pub async fn configure(
    agent: &Arc<Agent>,
    request: api::ConfigureSandboxRequest,
) -> Result<api::ConfigureSandboxResponse, Error> {
    {
        let mut begun = agent.configuring.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *begun, true) {
            return Err(Error::NotNow("the sandbox was configured before".to_owned()));
        }
    }
    if agent.rehearsal.get().is_some() {
        forget_rehearsal(agent)?;
    }
    if request.rehearsal {
        return rehearse(agent, request).await;
    }
    let ids = request.user_namespace.as_ref().map(IdMap::of_sandbox).transpose()?;
    let config = agent.config.clone();
    let request = blocking(move || {
        match config.boundary {
            Boundary::Guest => guest(&config, &request)?,
            Boundary::Host => host(&config, &request)?,
        }
        Ok(request)
    })
    .await?;
    let sandbox = match ids {
        Some(ids) => with_user_namespace(agent, ids, request).await?,
        None => Sandbox {
            pid_namespace: match request.shared_pid_namespace {
                true => Some(pause(agent).await?),
                false => None,
            },
            user_namespace: None,
        },
    };
    // Only the one call that has begun comes here.
    drop(agent.sandbox.set(sandbox));
    Ok(configured())
}

fn configured() -> api::ConfigureSandboxResponse {
    let kernel_release = rustix::system::uname().release().to_string_lossy().into_owned();
    api::ConfigureSandboxResponse { kernel_release }
}

/// Configures a guest that is no pod's yet: what runs for the first time here is not the first time
/// any more when the pod comes.
async fn rehearse(
    agent: &Arc<Agent>,
    request: api::ConfigureSandboxRequest,
) -> Result<api::ConfigureSandboxResponse, Error> {
    let namespaces = request.user_namespace.is_some() || request.shared_pid_namespace;
    if agent.config.boundary != Boundary::Guest || namespaces {
        return Err(Error::Unsupported("a rehearsal but of a plain guest".to_owned()));
    }
    let config = agent.config.clone();
    blocking(move || {
        guest(&config, &request)?;
        request.network.as_ref().map_or(Ok(()), network::give_back)
    })
    .await?;
    drop(agent.rehearsal.set(Sandbox { pid_namespace: None, user_namespace: None }));
    *agent.configuring.lock().unwrap_or_else(PoisonError::into_inner) = false;
    Ok(configured())
}

/// Takes away what a rehearsal has left.
fn forget_rehearsal(agent: &Agent) -> Result<(), Error> {
    if let Some(id) = agent.ids().first() {
        return Err(Error::NotNow(format!("the rehearsal's container {id} is still there")));
    }
    unmount(agent.config.shm(), UnmountFlags::DETACH).step("the rehearsal's shm")
}

/// Makes the process that holds the pod's PID namespace.
async fn pause(agent: &Agent) -> Result<OwnedFd, Error> {
    let namespaces = namespace::PID | namespace::MOUNT;
    Ok(agent.spawn(&Plan::Pause(None), namespaces, Descriptors::default()).await?.pidfd)
}

/// Makes the process that holds the pod's user namespace and those it owns.
async fn with_user_namespace(
    agent: &Agent,
    ids: IdMap,
    request: api::ConfigureSandboxRequest,
) -> Result<Sandbox, Error> {
    let namespaces = namespace::USER | namespace::PID | namespace::MOUNT | OWNED_BY_POD;
    let mut sysctls: Vec<_> =
        request.sysctls.into_iter().filter(|(name, _)| namespace_of(name).is_some()).collect();
    sysctls.sort();
    let plan = Plan::Pause(Some(PodPlan { ids, hostname: request.hostname, sysctls }));
    let holder = agent.start_process(&plan, namespaces, Descriptors::default()).await?;
    let (pid, pidfd) = (holder.pid, holder.pidfd.try_clone().step("user namespace")?);
    let network = request.network;
    let user_namespace =
        blocking(move || UserNamespace::set_up(pid, pidfd, ids, network.as_ref())).await?;
    holder.go_on()?;
    let holder = holder.ready().await?;
    Ok(Sandbox {
        pid_namespace: request.shared_pid_namespace.then_some(holder.pidfd),
        user_namespace: Some(user_namespace),
    })
}

fn guest(config: &Config, request: &api::ConfigureSandboxRequest) -> Result<(), Error> {
    if request.entropy.len() < LEAST_ENTROPY {
        return Err(Error::invalid(format!(
            "entropy has {} bytes, {LEAST_ENTROPY} are needed",
            request.entropy.len()
        )));
    }
    a3s_box_sys::entropy::add(&request.entropy).step("entropy")?;
    let now = Timespec {
        tv_sec: request.now_unix_nanos.div_euclid(NANOS),
        tv_nsec: request.now_unix_nanos.rem_euclid(NANOS),
    };
    clock_settime(ClockId::Realtime, now).step("clock")?;
    let hostname = &request.hostname;
    rustix::system::sethostname(hostname.as_bytes()).step(format_args!("hostname {hostname:?}"))?;
    // A user namespace owns the pod's network, and sets what belongs to it from inside.
    let apart = request.user_namespace.is_some();
    if let Some(network) = request.network.as_ref().filter(|_| !apart) {
        network::configure(network)?;
    }
    files(config, request)?;
    let mut sysctls: Vec<_> = request.sysctls.iter().collect();
    sysctls.retain(|(name, _)| !apart || namespace_of(name).is_none());
    sysctls.sort();
    for (name, value) in sysctls {
        set_sysctl(Path::new("/proc/sys"), name, value)?;
    }
    Ok(())
}

/// The node's kernel: only the files and what is in the pod's own namespaces are the pod's.
fn host(config: &Config, request: &api::ConfigureSandboxRequest) -> Result<(), Error> {
    if request.user_namespace.is_some() {
        return Err(Error::Unsupported("a user namespace outside a guest".to_owned()));
    }
    if config.owns(namespace::UTS) {
        let hostname = &request.hostname;
        rustix::system::sethostname(hostname.as_bytes())
            .step(format_args!("hostname {hostname:?}"))?;
    }
    if config.owns(namespace::NET) {
        network::loopback_up().step("loopback")?;
    }
    let mut sysctls: Vec<_> = request.sysctls.iter().collect();
    sysctls.sort();
    for (name, value) in sysctls {
        if !namespace_of(name).is_some_and(|namespace| config.owns(namespace)) {
            return Err(Error::Unsupported(format!(
                "sysctl {name}, which the pod shares with the node,"
            )));
        }
        set_sysctl(Path::new("/proc/sys"), name, value)?;
    }
    files(config, request)
}

/// The kind of namespace that a sysctl belongs to; `None`: to the whole kernel.
fn namespace_of(sysctl: &str) -> Option<u64> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let name = sysctl.replace('/', ".");
    if name.starts_with("net.") {
        Some(namespace::NET)
    } else if IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue.") {
        Some(namespace::IPC)
    } else {
        None
    }
}

fn files(config: &Config, request: &api::ConfigureSandboxRequest) -> Result<(), Error> {
    let write = |name: &str, text: String| {
        fs::write(config.etc(name), text).step(format_args!("write {name}"))
    };
    write("hostname", format!("{}\n", request.hostname))?;
    let hosts = if config.owns(namespace::NET) {
        hosts(request)
    } else {
        fs::read_to_string("/etc/hosts").step("read the node's hosts file")?
    };
    write("hosts", hosts)?;
    write("resolv.conf", resolv_conf(request.dns.as_ref()))?;
    fs::create_dir_all(config.shm()).step("shm")?;
    if !config.owns(namespace::IPC) {
        return mount_bind("/dev/shm", config.shm()).step("the node's /dev/shm");
    }
    let size = if request.shm_bytes == 0 { DEFAULT_SHM } else { request.shm_bytes };
    let options =
        CString::new(format!("mode=1777,size={size}")).map_err(std::io::Error::from).step("shm")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("shm", config.shm(), "tmpfs", flags, options.as_c_str()).step("shm")
}

fn hosts(request: &api::ConfigureSandboxRequest) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let interfaces = request.network.iter().flat_map(|network| &network.interfaces);
    for address in interfaces.flat_map(|interface| &interface.addresses) {
        let address = address.split('/').next().unwrap_or_default();
        if !request.hostname.is_empty() && !address.starts_with("fe80:") {
            text.push_str(&format!("{address}\t{}\n", request.hostname));
        }
    }
    text
}

fn resolv_conf(dns: Option<&api::Dns>) -> String {
    let Some(dns) = dns else { return String::new() };
    let mut text = String::new();
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    for (word, list) in [("search", &dns.searches), ("options", &dns.options)] {
        if !list.is_empty() {
            text.push_str(&format!("{word} {}\n", list.join(" ")));
        }
    }
    text
}

/// Writes one; dots or, in a name that has them first, slashes separate its parts.
pub fn set_sysctl(root: &Path, name: &str, value: &str) -> Result<(), Error> {
    let what = || format!("sysctl {name} = {value}");
    let first = name.find(['.', '/']).and_then(|at| name.get(at..=at));
    let path = if first == Some("/") { name.to_owned() } else { name.replace('.', "/") };
    let path = Path::new(&path);
    if !path.components().all(|part| matches!(part, Component::Normal(_))) || name.is_empty() {
        return Err(Error::invalid(format!("{}: no such name", what())));
    }
    fs::write(root.join(path), value).step(what())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_sysctl_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("net/core")).unwrap();
        fs::write(root.path().join("net/core/x"), "").unwrap();
        set_sysctl(root.path(), "net.core.x", "1").unwrap();
        set_sysctl(root.path(), "net/core/x", "2").unwrap();
        assert_eq!(fs::read_to_string(root.path().join("net/core/x")).unwrap(), "2");
        for bad in ["kernel.nothing.here", "../x", "", "/etc/passwd", "net/../../x"] {
            let error = set_sysctl(root.path(), bad, "1").unwrap_err().to_string();
            assert!(error.contains(&format!("sysctl {bad} = 1")), "{error}");
        }
    }

    #[test]
    fn a_sysctl_is_known_by_the_namespace_it_belongs_to() {
        for (name, namespace) in [
            ("net.ipv4.ip_forward", Some(namespace::NET)),
            ("net/ipv4/conf/eth0.1/forwarding", Some(namespace::NET)),
            ("kernel.shm_rmid_forced", Some(namespace::IPC)),
            ("fs.mqueue.msg_max", Some(namespace::IPC)),
            ("kernel.hostname", None),
            ("kernel.core_pattern", None),
            ("vm.swappiness", None),
        ] {
            assert_eq!(namespace_of(name), namespace, "{name}");
        }
    }

    #[test]
    fn resolv_conf_has_servers_searches_and_options() {
        let dns = api::Dns {
            servers: vec!["10.0.0.1".into(), "fd00::1".into()],
            searches: vec!["a.b".into(), "c".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(Some(&dns)),
            "nameserver 10.0.0.1\nnameserver fd00::1\nsearch a.b c\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(None), "");
    }

    #[test]
    fn the_pods_own_name_is_in_its_hosts_file() {
        let interface = api::Interface {
            addresses: vec!["10.1.0.5/24".into(), "fe80::1/64".into()],
            ..api::Interface::default()
        };
        let network = api::Network { interfaces: vec![interface], ..api::Network::default() };
        let request = api::ConfigureSandboxRequest {
            hostname: "web-0".into(),
            network: Some(network),
            ..api::ConfigureSandboxRequest::default()
        };
        let text = hosts(&request);
        assert!(text.contains("\n10.1.0.5\tweb-0\n") && !text.contains("fe80"), "{text}");
    }
}
