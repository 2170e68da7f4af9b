//! CRI's capability names to the sets of a process.

use crate::{container::spec::Security, sandbox::SandboxError};
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

/// Every capability of the guest's kernel.
const ALL: [Capability; 41] = [
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::AuditWrite,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Kill,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::Mknod,
    Capability::NetAdmin,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetRaw,
    Capability::Perfmon,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysChroot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

/// The process's sets. `ALL` is applied before single names, so `add: [X], drop: [ALL]` is X alone.
pub fn capabilities(security: &Security) -> Result<LinuxCapabilities, SandboxError> {
    let mut sets = LinuxCapabilities::default();
    let ambient = parse("add_ambient_capabilities", &security.add_ambient_capabilities)?;
    let mut set: HashSet<Capability> =
        if security.privileged { ALL.into() } else { chosen(security)? };
    set.extend(&ambient);
    sets.set_bounding(Some(set.clone()))
        .set_permitted(Some(set.clone()))
        .set_effective(Some(set))
        // Inheritable ones would pass to programs with file capabilities behind the user's back.
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    Ok(sets)
}

fn chosen(security: &Security) -> Result<HashSet<Capability>, SandboxError> {
    let all = |list: &[String]| list.iter().any(|name| name.eq_ignore_ascii_case("ALL"));
    let mut set: HashSet<Capability> = DEFAULT.into();
    if all(&security.add_capabilities) {
        set = ALL.into();
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
        capabilities(&security).unwrap().effective().clone().unwrap()
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
    fn ambient_ones_are_in_every_set_and_others_are_not_inheritable() {
        let security =
            Security { add_ambient_capabilities: vec!["NET_ADMIN".into()], ..Security::default() };
        let sets = capabilities(&security).unwrap();
        assert_eq!(sets.ambient(), &Some([NetAdmin].into()));
        assert_eq!(sets.inheritable(), &Some([NetAdmin].into()));
        assert!(sets.effective().as_ref().unwrap().is_superset(&[NetAdmin, Chown].into()));
    }

    #[test]
    fn an_unknown_name_is_refused_with_its_field() {
        let security = Security { drop_capabilities: vec!["FLY".into()], ..Security::default() };
        let error = capabilities(&security).unwrap_err().to_string();
        assert!(error.contains("drop_capabilities") && error.contains("FLY"), "{error}");
    }
}
