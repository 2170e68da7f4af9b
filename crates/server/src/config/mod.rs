//! The configuration: one TOML file, read once.
//!
//! [`file`] reads it as written ([`file::RawConfig`]: every key optional) and [`Config::resolve`] fills in
//! the defaults and finds what lies beside the program. Both go on after a problem, so that one run tells
//! all of them. An unknown key is a problem.

pub mod beside;
pub mod file;

use self::{beside::Beside, file::RawConfig};
use a3s_box_types::shim::VmSize;
use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

/// The commented defaults, as `a3s-box-cri config default` prints them.
pub const DEFAULT: &str = include_str!("default.toml");

/// Where the configuration is looked for when nobody says so.
pub const PATH: &str = "/etc/a3s-box/config.toml";

/// Everything the configuration decides, with defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The CRI's Unix socket.
    pub socket: PathBuf,
    /// What survives a reboot.
    pub root: PathBuf,
    /// What a reboot ends.
    pub state: PathBuf,
    /// `tracing` filter.
    pub log: String,
    /// The shim's program.
    pub shim: PathBuf,
    /// The agent's program, for pods on the node's kernel.
    pub agent: PathBuf,
    /// Images.
    pub image: ImageConfig,
    /// Pod network.
    pub network: NetworkConfig,
    /// Exec, attach and port-forward.
    pub streaming: StreamingConfig,
    /// The server's own metrics.
    pub metrics: MetricsConfig,
    /// Virtual machines.
    pub vm: VmSettings,
    /// Runtime handlers by name; `""` and `a3s-box` are always there.
    pub handlers: BTreeMap<String, Handler>,
}

/// `[image]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// certs.d tree with containerd's hosts.toml files; `None`: registries are asked directly.
    pub registry_config: Option<PathBuf>,
}

/// `[network]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// CNI configuration files.
    pub conf_dir: PathBuf,
    /// CNI plugins, first match wins.
    pub bin_dirs: Vec<PathBuf>,
    /// For one plugin to answer.
    pub plugin_timeout: Duration,
}

/// `[streaming]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamingConfig {
    /// Where the streaming server listens; port 0: any.
    pub address: SocketAddr,
    /// What clients' URLs begin with; `None`: `http://` (or `https://`) and the address.
    pub advertised: Option<String>,
    /// A session on which nothing moves for so long ends.
    pub idle_timeout: Duration,
    /// How long a client may take to open its streams.
    pub creation_timeout: Duration,
    /// `None`: without TLS.
    pub tls: Option<TlsFiles>,
}

/// `[streaming] tls_*`: PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate and those above it.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Who signs for clients; `None`: any client may come.
    pub client_ca: Option<PathBuf>,
}

/// `[metrics]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Where Prometheus finds them; `None`: nowhere.
    pub address: Option<SocketAddr>,
}

/// `[vm]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSettings {
    /// What executes guests.
    pub accel: AccelChoice,
    /// How a guest comes to life.
    pub start: StartMode,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs: agent and modules.
    pub initramfs: PathBuf,
    /// Size of a pod without limits.
    pub default_size: VmSize,
    /// Largest size of a pod.
    pub max_size: VmSize,
    /// Smallest guest that boots.
    pub min_memory_mb: u32,
    /// Guest memory that no container can use: kernel and agent.
    pub guest_overhead_mb: u32,
    /// Size of a pod's writable disk in bytes; it takes room as it fills.
    pub disk_bytes: u64,
    /// First of the user ids that QEMU processes run as.
    pub uid_base: u32,
    /// How many user ids there are; sandboxes beyond that share them.
    pub uid_count: u32,
    /// How many guests wait for their pods.
    pub spares: usize,
    /// For a template to be booted and saved.
    pub template_timeout: Duration,
    /// For the KVM try, which `accel = "auto"` makes first.
    pub kvm_probe_timeout: Duration,
    /// For a sandbox's guest to answer.
    pub start_timeout: Duration,
}

/// `[vm] accel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM when a guest really starts under it, else TCG.
    Auto,
    /// KVM or nothing.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// `[vm] start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// As a copy of a booted template; a boot is the fallback.
    Clone,
    /// From kernel and initramfs, each time.
    Boot,
}

/// `[handlers.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// What happens to pods that ask for the node's namespaces.
    pub host_namespaces: HostNamespaces,
}

/// `host_namespaces` of a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostNamespaces {
    /// They run on the node's own kernel: a pod in a virtual machine has no share in its namespaces.
    Allow,
    /// They are refused: every pod has a virtual machine.
    Refuse,
}

impl Handler {
    /// What the handler of this name is without a word about it. A node's own pods (its CNI agent,
    /// kube-proxy) name no handler; whoever names one wants a virtual machine.
    fn default_of(name: &str) -> Self {
        let host_namespaces =
            if name.is_empty() { HostNamespaces::Allow } else { HostNamespaces::Refuse };
        Self { host_namespaces }
    }
}

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line in the file, from 1; `None`: not about one line.
    pub line: Option<usize>,
    /// `vm.accel`; empty for the file itself.
    pub key: String,
    /// What is wrong.
    pub why: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.why)
    }
}

/// Everything that is wrong with a configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))]
pub struct Problems(pub Vec<Problem>);

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file was read and is wrong.
    #[error("{path}:\n{problems}")]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Problems,
    },
}

impl Config {
    /// Reads and resolves the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, &Beside::this_program())
            .map_err(|problems| ConfigError::Wrong { path: path.to_owned(), problems })
    }

    /// The configuration this text means.
    pub fn parse(text: &str, beside: &Beside) -> Result<Self, Problems> {
        let (raw, mut problems) = file::parse(text);
        let config = Self::resolve(raw, beside, &mut problems);
        if problems.is_empty() { Ok(config) } else { Err(Problems(problems)) }
    }

    /// Fills in what the file leaves open and checks what depends on several keys.
    fn resolve(raw: RawConfig, beside: &Beside, problems: &mut Vec<Problem>) -> Self {
        let state = raw.state.unwrap_or_else(|| "/run/a3s-box".into());
        let vm = raw.vm;
        let config = Self {
            socket: raw.socket.unwrap_or_else(|| state.join("a3s-box.sock")),
            root: raw.root.unwrap_or_else(|| "/var/lib/a3s-box".into()),
            state,
            log: raw.log.unwrap_or_else(|| "info".to_owned()),
            shim: raw.shim.unwrap_or_else(|| beside.shim()),
            agent: raw.agent.unwrap_or_else(|| beside.agent()),
            image: ImageConfig { registry_config: raw.registry_config },
            network: NetworkConfig {
                conf_dir: raw.conf_dir.unwrap_or_else(|| "/etc/cni/net.d".into()),
                bin_dirs: raw
                    .bin_dirs
                    .unwrap_or_else(|| vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()]),
                plugin_timeout: milliseconds(raw.plugin_timeout_ms, 60_000),
            },
            streaming: StreamingConfig {
                address: raw.address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))),
                advertised: raw.advertised,
                idle_timeout: milliseconds(raw.idle_timeout_ms, 4 * 60 * 60 * 1000),
                creation_timeout: milliseconds(raw.creation_timeout_ms, 30_000),
                tls: tls(raw.tls_certificate, raw.tls_key, raw.tls_client_ca, problems),
            },
            metrics: MetricsConfig { address: raw.metrics_address },
            vm: VmSettings {
                accel: vm.accel.unwrap_or(AccelChoice::Auto),
                start: vm.start.unwrap_or(StartMode::Clone),
                qemu: vm.qemu.unwrap_or_else(|| "/usr/bin/qemu-system-x86_64".into()),
                kernel: vm.kernel.unwrap_or_else(|| beside.guest("vmlinuz")),
                initramfs: vm.initramfs.unwrap_or_else(|| beside.guest("initramfs")),
                default_size: VmSize {
                    vcpus: vm.default_vcpus.unwrap_or(1),
                    memory_mb: vm.default_memory_mb.unwrap_or(512),
                },
                max_size: VmSize {
                    vcpus: vm.max_vcpus.unwrap_or(16),
                    memory_mb: vm.max_memory_mb.unwrap_or(65_536),
                },
                min_memory_mb: vm.min_memory_mb.unwrap_or(128),
                guest_overhead_mb: vm.guest_overhead_mb.unwrap_or(64),
                disk_bytes: vm.disk_mb.unwrap_or(16_384) << 20,
                uid_base: vm.uid_base.unwrap_or(1_879_048_192),
                uid_count: vm.uid_count.unwrap_or(65_536),
                spares: vm.spares.unwrap_or(2),
                template_timeout: milliseconds(vm.template_timeout_ms, 60_000),
                kvm_probe_timeout: milliseconds(vm.kvm_probe_timeout_ms, 10_000),
                start_timeout: milliseconds(vm.start_timeout_ms, 60_000),
            },
            handlers: handlers(raw.handlers),
        };
        config.vm.check(problems);
        config
    }
}

fn tls(
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    problems: &mut Vec<Problem>,
) -> Option<TlsFiles> {
    let missing = match (&certificate, &key, &client_ca) {
        (None, None, None) | (Some(_), Some(_), _) => None,
        (None, ..) => Some("certificate"),
        (Some(_), None, _) => Some("key"),
    };
    if let Some(name) = missing {
        let key = format!("streaming.tls_{name}");
        let why = "is missing: TLS needs a certificate and its key".to_owned();
        problems.push(Problem { line: None, key, why });
    }
    Some(TlsFiles { certificate: certificate?, key: key?, client_ca })
}

fn milliseconds(written: Option<u64>, default: u64) -> Duration {
    Duration::from_millis(written.unwrap_or(default))
}

/// The configured handlers and the two that always exist.
fn handlers(raw: BTreeMap<String, file::RawHandler>) -> BTreeMap<String, Handler> {
    let mut handlers: BTreeMap<_, _> =
        ["", "a3s-box"].map(|name| (name.to_owned(), Handler::default_of(name))).into();
    for (name, raw) in raw {
        let mut handler = Handler::default_of(&name);
        if let Some(host_namespaces) = raw.host_namespaces {
            handler.host_namespaces = host_namespaces;
        }
        handlers.insert(name, handler);
    }
    handlers
}

impl VmSettings {
    /// What no single key can tell.
    fn check(&self, problems: &mut Vec<Problem>) {
        let mut problem = |key: &str, why: String| {
            problems.push(Problem { line: None, key: format!("vm.{key}"), why });
        };
        let (default, max, min) = (self.default_size, self.max_size, self.min_memory_mb);
        if default.vcpus > max.vcpus {
            problem(
                "default_vcpus",
                format!("{} is more than max_vcpus {}", default.vcpus, max.vcpus),
            );
        }
        if !(min..=max.memory_mb).contains(&default.memory_mb) {
            let why = format!(
                "{} is not from min_memory_mb {min} to max_memory_mb {}",
                default.memory_mb, max.memory_mb
            );
            problem("default_memory_mb", why);
        }
        if min <= self.guest_overhead_mb {
            let why =
                format!("{min} leaves nothing beside guest_overhead_mb {}", self.guest_overhead_mb);
            problem("min_memory_mb", why);
        }
        if self.uid_base.checked_add(self.uid_count).is_none() {
            problem("uid_count", "goes beyond the last user id".to_owned());
        }
    }
}

#[cfg(test)]
mod tests;
