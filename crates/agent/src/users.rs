//! Who a container's process runs as, by the container's own /etc/passwd and /etc/group.
//!
//! `user` is an image's USER; `uid` and `gid` come from the pod and are stronger. A numeric user
//! need not be in the database; a name must be.

use crate::{
    child::{invalid, step},
    plan::{Failure, User, WantedUser},
    rootfs,
};

/// Larger databases are cut off; images have a few kilobytes.
const LIMIT: u64 = 4 << 20;

/// Reads the databases at / and decides.
pub fn resolve(wanted: &WantedUser) -> Result<User, Failure> {
    let passwd = step(rootfs::read_small("/etc/passwd", LIMIT), "/etc/passwd")?.unwrap_or_default();
    let group = step(rootfs::read_small("/etc/group", LIMIT), "/etc/group")?.unwrap_or_default();
    decide(wanted, &passwd, &group)
}

/// Home folder of a user of the container; `/` when nobody knows it.
pub fn home(uid: u32) -> String {
    let passwd = rootfs::read_small("/etc/passwd", LIMIT).ok().flatten().unwrap_or_default();
    let home = entries(&passwd).find(|entry| entry.uid == uid).map(|entry| entry.home.to_owned());
    home.filter(|home| !home.is_empty()).unwrap_or_else(|| "/".to_owned())
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn entries(passwd: &str) -> impl Iterator<Item = Entry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.trim();
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Entry { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    })
}

/// Name, id, members.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.trim();
        Some((name, fields.nth(1)?.parse().ok()?, fields.next().unwrap_or_default()))
    })
}

fn decide(wanted: &WantedUser, passwd: &str, group: &str) -> Result<User, Failure> {
    let (user, wanted_group) = match wanted.user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (wanted.user.as_str(), None),
    };
    let uid = match wanted.uid {
        Some(uid) => Some(uid),
        None if user.is_empty() => Some(0),
        None => user.parse().ok(),
    };
    let entry =
        match uid {
            Some(uid) => entries(passwd).find(|entry| entry.uid == uid),
            None => Some(entries(passwd).find(|entry| entry.name == user).ok_or_else(|| {
                invalid(format!("no user {user:?} in the container's /etc/passwd"))
            })?),
        };
    let uid = uid.or_else(|| entry.as_ref().map(|entry| entry.uid)).unwrap_or_default();
    // A group of the image goes with a user of the image only.
    let wanted_group = wanted_group.filter(|group| wanted.uid.is_none() && !group.is_empty());
    let gid = match (wanted.gid, wanted_group) {
        (Some(gid), _) => gid,
        (None, Some(name)) => match name.parse() {
            Ok(gid) => gid,
            Err(_) => {
                groups(group)
                    .find(|(known, ..)| *known == name)
                    .ok_or_else(|| {
                        invalid(format!("no group {name:?} in the container's /etc/group"))
                    })?
                    .1
            }
        },
        (None, None) => entry.as_ref().map_or(0, |entry| entry.gid),
    };

    let mut all = vec![gid];
    if let Some(entry) = entry.filter(|_| !wanted.strict_groups) {
        all.extend(
            groups(group)
                .filter(|(.., members)| {
                    members.split(',').any(|member| member.trim() == entry.name)
                })
                .map(|(_, gid, _)| gid),
        );
    }
    all.extend(&wanted.supplemental_groups);
    let mut unique = Vec::with_capacity(all.len());
    for group in all {
        if !unique.contains(&group) {
            unique.push(group);
        }
    }
    Ok(User { uid, gid, groups: unique })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment\nwww:x:33:34:web:/var/www:/bin/false\nbroken:x:y\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nextra:x:50:other,www\nlast:x:60:www";

    fn decided(
        user: &str,
        change: impl FnOnce(&mut WantedUser),
    ) -> Result<(u32, u32, Vec<u32>), String> {
        let mut wanted = WantedUser { user: user.to_owned(), ..WantedUser::default() };
        change(&mut wanted);
        decide(&wanted, PASSWD, GROUP)
            .map(|user| (user.uid, user.gid, user.groups))
            .map_err(|failure| failure.message)
    }

    #[test]
    fn an_images_user_may_be_a_name_or_a_number_with_or_without_a_group() {
        for (user, expected) in [
            ("", (0, 0, vec![0])),
            ("www", (33, 34, vec![34, 50, 60])),
            ("33", (33, 34, vec![34, 50, 60])),
            ("1234", (1234, 0, vec![0])),
            ("1234:50", (1234, 50, vec![50])),
            ("www:extra", (33, 50, vec![50, 60])),
            ("www:", (33, 34, vec![34, 50, 60])),
        ] {
            assert_eq!(decided(user, |_| {}), Ok(expected), "{user:?}");
        }
    }

    #[test]
    fn a_name_must_be_in_the_containers_own_database() {
        assert_eq!(
            decided("nobody", |_| {}),
            Err("no user \"nobody\" in the container's /etc/passwd".into())
        );
        assert_eq!(
            decided("www:none", |_| {}),
            Err("no group \"none\" in the container's /etc/group".into())
        );
        assert!(decided("broken", |_| {}).is_err());
    }

    #[test]
    fn the_pods_ids_are_stronger_than_the_images() {
        assert_eq!(decided("www:extra", |w| w.uid = Some(7)), Ok((7, 0, vec![0])));
        assert_eq!(decided("missing", |w| w.uid = Some(33)), Ok((33, 34, vec![34, 50, 60])));
        assert_eq!(decided("www", |w| w.gid = Some(9)), Ok((33, 9, vec![9, 50, 60])));
    }

    #[test]
    fn supplemental_groups_are_added_and_strict_leaves_out_the_images() {
        assert_eq!(
            decided("www", |w| w.supplemental_groups = vec![60, 70]),
            Ok((33, 34, vec![34, 50, 60, 70]))
        );
        let strict = |w: &mut WantedUser| {
            w.supplemental_groups = vec![70];
            w.strict_groups = true;
        };
        assert_eq!(decided("www", strict), Ok((33, 34, vec![34, 70])));
    }
}
