//! The configuration file as written: every key optional, every problem with its line.

use super::{AccelChoice, HostNamespaces, Problem, StartMode};
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

/// What the file says; `None` where it says nothing.
#[derive(Debug, Default)]
pub struct RawConfig {
    pub(super) socket: Option<PathBuf>,
    pub(super) root: Option<PathBuf>,
    pub(super) state: Option<PathBuf>,
    pub(super) log: Option<String>,
    pub(super) shim: Option<PathBuf>,
    pub(super) agent: Option<PathBuf>,
    pub(super) registry_config: Option<PathBuf>,
    pub(super) conf_dir: Option<PathBuf>,
    pub(super) bin_dirs: Option<Vec<PathBuf>>,
    pub(super) plugin_timeout_ms: Option<u64>,
    pub(super) address: Option<SocketAddr>,
    pub(super) advertised: Option<String>,
    pub(super) idle_timeout_ms: Option<u64>,
    pub(super) creation_timeout_ms: Option<u64>,
    pub(super) tls_certificate: Option<PathBuf>,
    pub(super) tls_key: Option<PathBuf>,
    pub(super) tls_client_ca: Option<PathBuf>,
    pub(super) metrics_address: Option<SocketAddr>,
    pub(super) vm: RawVm,
    pub(super) handlers: BTreeMap<String, RawHandler>,
}

/// `[vm]` as written.
#[derive(Debug, Default)]
pub struct RawVm {
    pub(super) accel: Option<AccelChoice>,
    pub(super) start: Option<StartMode>,
    pub(super) qemu: Option<PathBuf>,
    pub(super) kernel: Option<PathBuf>,
    pub(super) initramfs: Option<PathBuf>,
    pub(super) default_vcpus: Option<u32>,
    pub(super) default_memory_mb: Option<u32>,
    pub(super) max_vcpus: Option<u32>,
    pub(super) max_memory_mb: Option<u32>,
    pub(super) min_memory_mb: Option<u32>,
    pub(super) guest_overhead_mb: Option<u32>,
    pub(super) disk_mb: Option<u64>,
    pub(super) uid_base: Option<u32>,
    pub(super) uid_count: Option<u32>,
    pub(super) spares: Option<usize>,
    pub(super) template_timeout_ms: Option<u64>,
    pub(super) kvm_probe_timeout_ms: Option<u64>,
    pub(super) start_timeout_ms: Option<u64>,
}

/// `[handlers.NAME]` as written.
#[derive(Debug, Default)]
pub struct RawHandler {
    pub(super) host_namespaces: Option<HostNamespaces>,
}

/// Reads the file's text, as far as it can be read.
pub fn parse(text: &str) -> (RawConfig, Vec<Problem>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut problems: Vec<Problem> = errors
        .iter()
        .map(|error| Problem {
            line: error.span().map(|span| line(text, span.start)),
            key: String::new(),
            why: error.message().to_owned(),
        })
        .collect();
    let mut top =
        Section { text, name: String::new(), table: table.into_inner(), problems: &mut problems };
    let mut raw = RawConfig {
        socket: top.take("socket", path),
        root: top.take("root", path),
        state: top.take("state", path),
        log: top.take("log", filter),
        shim: top.take("shim", path),
        agent: top.take("agent", path),
        ..RawConfig::default()
    };
    top.section("image", |image| raw.registry_config = image.take("registry_config", path));
    top.section("network", |network| {
        raw.conf_dir = network.take("conf_dir", path);
        raw.bin_dirs = network.take("bin_dirs", paths);
        raw.plugin_timeout_ms = network.take("plugin_timeout_ms", positive);
    });
    top.section("streaming", |streaming| {
        raw.address = streaming.take("address", address);
        raw.advertised = streaming.take("advertised", url);
        raw.idle_timeout_ms = streaming.take("idle_timeout_ms", positive);
        raw.creation_timeout_ms = streaming.take("creation_timeout_ms", positive);
        raw.tls_certificate = streaming.take("tls_certificate", path);
        raw.tls_key = streaming.take("tls_key", path);
        raw.tls_client_ca = streaming.take("tls_client_ca", path);
    });
    top.section("metrics", |metrics| raw.metrics_address = metrics.take("address", address));
    top.section("vm", |vm| raw.vm = read_vm(vm));
    top.section("handlers", |handlers| {
        for name in handlers.keys() {
            let mut handler = RawHandler::default();
            handlers.section(&name, |section| {
                handler.host_namespaces = section.take("host_namespaces", host_namespaces);
            });
            raw.handlers.insert(name, handler);
        }
    });
    top.refuse_the_rest();
    problems.sort_by_key(|problem| problem.line);
    (raw, problems)
}

fn read_vm(vm: &mut Section<'_, '_>) -> RawVm {
    RawVm {
        accel: vm.take("accel", |value| {
            choice(
                value,
                &[
                    ("auto", AccelChoice::Auto),
                    ("kvm", AccelChoice::Kvm),
                    ("tcg", AccelChoice::Tcg),
                ],
            )
        }),
        start: vm.take("start", |value| {
            choice(value, &[("clone", StartMode::Clone), ("boot", StartMode::Boot)])
        }),
        qemu: vm.take("qemu", path),
        kernel: vm.take("kernel", path),
        initramfs: vm.take("initramfs", path),
        default_vcpus: vm.take("default_vcpus", positive),
        default_memory_mb: vm.take("default_memory_mb", positive),
        max_vcpus: vm.take("max_vcpus", positive),
        max_memory_mb: vm.take("max_memory_mb", positive),
        min_memory_mb: vm.take("min_memory_mb", positive),
        guest_overhead_mb: vm.take("guest_overhead_mb", positive),
        disk_mb: vm.take("disk_mb", mebibytes),
        // 0 would be root, which a guest that breaks out must not be.
        uid_base: vm.take("uid_base", positive),
        uid_count: vm.take("uid_count", positive),
        spares: vm.take("spares", count),
        template_timeout_ms: vm.take("template_timeout_ms", positive),
        kvm_probe_timeout_ms: vm.take("kvm_probe_timeout_ms", positive),
        start_timeout_ms: vm.take("start_timeout_ms", positive),
    }
}

/// One table of the file, of which the known keys are taken; what is left is a problem.
struct Section<'t, 'p> {
    text: &'t str,
    name: String,
    table: DeTable<'t>,
    problems: &'p mut Vec<Problem>,
}

impl<'t> Section<'t, '_> {
    fn take<T>(
        &mut self,
        key: &str,
        read: impl FnOnce(&DeValue<'t>) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.table.remove(key)?;
        match read(value.get_ref()) {
            Ok(value) => Some(value),
            Err(why) => {
                self.problem(key, value.span().start, why);
                None
            }
        }
    }

    /// Reads a table in this one, whole.
    fn section(&mut self, key: &str, read: impl FnOnce(&mut Section<'t, '_>)) {
        let Some(value) = self.table.remove(key) else { return };
        let at = value.span().start;
        match value.into_inner() {
            DeValue::Table(table) => {
                let name = self.path_of(key);
                let mut section = Section { text: self.text, name, table, problems: self.problems };
                read(&mut section);
                section.refuse_the_rest();
            }
            other => self.problem(key, at, format!("is a {}, not a table", other.type_str())),
        }
    }

    fn keys(&self) -> Vec<String> {
        self.table.keys().map(|key| key.get_ref().to_string()).collect()
    }

    fn refuse_the_rest(&mut self) {
        let rest: Vec<(String, usize)> =
            self.table.keys().map(|key| (key.get_ref().to_string(), key.span().start)).collect();
        for (key, at) in rest {
            self.problem(&key, at, "is not a key of this configuration".to_owned());
        }
    }

    fn problem(&mut self, key: &str, at: usize, why: String) {
        let (line, key) = (Some(line(self.text, at)), self.path_of(key));
        self.problems.push(Problem { line, key, why });
    }

    fn path_of(&self, key: &str) -> String {
        let key = if key.is_empty() { "\"\"" } else { key };
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }
}

fn line(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

fn string<'v>(value: &'v DeValue<'_>) -> Result<&'v str, String> {
    value.as_str().ok_or_else(|| format!("is a {}, not a string", value.type_str()))
}

fn path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    let path = PathBuf::from(string(value)?);
    if path.is_absolute() { Ok(path) } else { Err(format!("{path:?} is not an absolute path")) }
}

fn paths(value: &DeValue<'_>) -> Result<Vec<PathBuf>, String> {
    let list = value.as_array().ok_or_else(|| format!("is a {}, not a list", value.type_str()))?;
    if list.is_empty() {
        return Err("is empty".to_owned());
    }
    list.iter().map(|item: &Spanned<DeValue<'_>>| path(item.get_ref())).collect()
}

fn filter(value: &DeValue<'_>) -> Result<String, String> {
    let text = string(value)?;
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{text:?} is not a log filter: {error}")),
    }
}

fn address(value: &DeValue<'_>) -> Result<SocketAddr, String> {
    let text = string(value)?;
    text.parse().map_err(|_| format!("{text:?} is not an IP address with a port"))
}

fn url(value: &DeValue<'_>) -> Result<String, String> {
    let text = string(value)?;
    if text.starts_with("http://") || text.starts_with("https://") {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} does not begin with http:// or https://"))
}

fn positive<N: std::str::FromStr + PartialOrd + From<u8>>(
    value: &DeValue<'_>,
) -> Result<N, String> {
    let integer =
        value.as_integer().ok_or_else(|| format!("is a {}, not an integer", value.type_str()))?;
    let number = i128::from_str_radix(integer.as_str(), integer.radix()).unwrap_or(-1);
    match number.to_string().parse::<N>() {
        Ok(number) if number > N::from(0) => Ok(number),
        Ok(_) | Err(_) => Err(format!("{integer} is not a positive number of this kind")),
    }
}

/// A number of things, of which there may be none.
fn count(value: &DeValue<'_>) -> Result<usize, String> {
    match value.as_integer() {
        Some(zero) if zero.as_str() == "0" => Ok(0),
        _ => positive::<u16>(value).map(usize::from),
    }
}

/// An amount that still is one in bytes.
fn mebibytes(value: &DeValue<'_>) -> Result<u64, String> {
    match positive::<u64>(value)? {
        amount if amount <= 1 << 30 => Ok(amount),
        amount => Err(format!("{amount} is more than 2^30")),
    }
}

fn host_namespaces(value: &DeValue<'_>) -> Result<HostNamespaces, String> {
    choice(value, &[("allow", HostNamespaces::Allow), ("refuse", HostNamespaces::Refuse)])
}

fn choice<T: Copy>(value: &DeValue<'_>, choices: &[(&str, T)]) -> Result<T, String> {
    let text = string(value)?;
    match choices.iter().find(|(name, _)| *name == text) {
        Some((_, choice)) => Ok(*choice),
        None => {
            let names: Vec<_> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
            Err(format!("{text:?} is not one of {}", names.join(", ")))
        }
    }
}
