//! CRI's capability names to the sets of a process.

use crate::{
    container::spec::Security,
    sandbox::{SandboxError, spec::Boundary},
};
use oci_spec::runtime::{Capability, LinuxCapabilities};
use std::{collections::HashSet, str::FromStr};

/// What a container gets when nothing is said: the set that images are written for.
const DEFAULT: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Every capability, in the kernel's order: the index is the number.
const ALL: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// The process's sets. `ALL` is applied before single names, so `add: [X], drop: [ALL]` is X alone.
pub fn capabilities(
    security: &Security,
    boundary: Boundary,
) -> Result<LinuxCapabilities, SandboxError> {
    let all = match boundary {
        Boundary::Microvm => ALL.into(),
        Boundary::Host => own()?,
    };
    let mut sets = LinuxCapabilities::default();
    let ambient = parse("add_ambient_capabilities", &security.add_ambient_capabilities)?;
    let mut set: HashSet<Capability> =
        if security.privileged { all } else { chosen(security, &all)? };
    set.extend(&ambient);
    sets.set_bounding(Some(set.clone()))
        .set_permitted(Some(set.clone()))
        .set_effective(Some(set))
        // Inheritable ones would pass to programs with file capabilities behind the user's back.
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    Ok(sets)
}

/// What this server has: on the node's own kernel nobody gets more.
fn own() -> Result<HashSet<Capability>, SandboxError> {
    let sets = rustix::thread::capabilities(None)
        .map_err(|error| SandboxError::step("read the server's capabilities", error))?;
    let has = |number: &usize| sets.permitted.bits() & 1 << number != 0;
    Ok(ALL.iter().enumerate().filter(|(number, _)| has(number)).map(|(_, one)| *one).collect())
}

fn chosen(
    security: &Security,
    every: &HashSet<Capability>,
) -> Result<HashSet<Capability>, SandboxError> {
    let all = |list: &[String]| list.iter().any(|name| name.eq_ignore_ascii_case("ALL"));
    let mut set: HashSet<Capability> = DEFAULT.into();
    if all(&security.add_capabilities) {
        set.clone_from(every);
    }
    if all(&security.drop_capabilities) {
        set.clear();
    }
    set.extend(parse("add_capabilities", &security.add_capabilities)?);
    for dropped in parse("drop_capabilities", &security.drop_capabilities)? {
        set.remove(&dropped);
    }
    Ok(set)
}

/// The single names of a list; `ALL` is not one.
fn parse(field: &str, names: &[String]) -> Result<HashSet<Capability>, SandboxError> {
    let mut set = HashSet::new();
    for name in names.iter().filter(|name| !name.eq_ignore_ascii_case("ALL")) {
        let upper = name.to_ascii_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let capability = Capability::from_str(short).map_err(|_| {
            let field = format!("linux.security_context.capabilities.{field}");
            SandboxError::invalid(field, format!("{name:?} is no capability"))
        })?;
        set.insert(capability);
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Capability::{Chown, NetAdmin, NetRaw, SysAdmin};

    fn sets(add: &[&str], drop: &[&str], privileged: bool) -> HashSet<Capability> {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
        let security = Security {
            add_capabilities: names(add),
            drop_capabilities: names(drop),
            privileged,
            ..Security::default()
        };
        capabilities(&security, Boundary::Microvm).unwrap().effective().clone().unwrap()
    }

    #[test]
    fn add_and_drop_work_on_the_default_set_and_all_comes_first() {
        let defaults: HashSet<_> = DEFAULT.into();
        let all: HashSet<_> = ALL.into();
        assert_eq!(sets(&[], &[], false), defaults);
        assert_eq!(
            sets(&["NET_ADMIN"], &[], false),
            defaults.clone().into_iter().chain([NetAdmin]).collect()
        );
        assert_eq!(sets(&["cap_net_admin"], &["ALL"], false), [NetAdmin].into());
        assert_eq!(sets(&[], &["CAP_NET_RAW"], false), &defaults - &[NetRaw].into());
        assert_eq!(sets(&["ALL"], &["SYS_ADMIN"], false), &all - &[SysAdmin].into());
        assert_eq!(sets(&["all"], &["all"], false), HashSet::new());
        assert_eq!(sets(&[], &["ALL"], true), all);
    }

    #[test]
    fn on_the_nodes_kernel_all_are_those_this_server_has() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:")).unwrap();
        let own = u64::from_str_radix(line.trim(), 16).unwrap();
        let security = Security { privileged: true, ..Security::default() };
        let sets = capabilities(&security, Boundary::Host).unwrap();
        let bit = |one: &Capability| 1 << ALL.iter().position(|other| other == one).unwrap();
        let effective = sets.effective().clone().unwrap();
        assert_eq!(effective.iter().map(bit).sum::<u64>(), own & ((1 << ALL.len()) - 1));
    }

    #[test]
    fn ambient_ones_are_in_every_set_and_others_are_not_inheritable() {
        let security =
            Security { add_ambient_capabilities: vec!["NET_ADMIN".into()], ..Security::default() };
        let sets = capabilities(&security, Boundary::Microvm).unwrap();
        assert_eq!(sets.ambient(), &Some([NetAdmin].into()));
        assert_eq!(sets.inheritable(), &Some([NetAdmin].into()));
        assert!(sets.effective().as_ref().unwrap().is_superset(&[NetAdmin, Chown].into()));
    }

    #[test]
    fn an_unknown_name_is_refused_with_its_field() {
        let security = Security { drop_capabilities: vec!["FLY".into()], ..Security::default() };
        let error = capabilities(&security, Boundary::Microvm).unwrap_err().to_string();
        assert!(error.contains("drop_capabilities") && error.contains("FLY"), "{error}");
    }
}
