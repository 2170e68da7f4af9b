//! A netlink connection into a namespace. Only the socket is made there; a socket stays in the
//! namespace it was made in, so it can be used from anywhere.

use crate::{NetError, netns};
use futures::TryStreamExt;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec};
use std::path::{Path, PathBuf};
use tokio::task::JoinHandle;

/// The connection, closed when dropped.
pub(crate) struct Netlink {
    pub handle: Handle,
    netns: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One interface.
pub(crate) struct Link {
    pub index: u32,
    pub mac: Vec<u8>,
    pub mtu: u32,
}

impl Netlink {
    pub fn open(netns: &Path) -> Result<Self, NetError> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = netns::inside(netns, || {
            let _guard = runtime.enter();
            rtnetlink::new_connection()
        })
        .map_err(NetError::io("open netlink in", netns))?;
        let task = tokio::spawn(connection);
        Ok(Self { handle, netns: netns.to_owned(), task })
    }

    /// For `map_err`: names the step and the namespace.
    pub fn failed(&self, step: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetError {
        let (step, netns) = (step.into(), self.netns.clone());
        move |source| NetError::Netlink { step, netns, source }
    }

    pub async fn link(&self, name: &str) -> Result<Link, NetError> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        let gone =
            || NetError::NoInterface { netns: self.netns.clone(), interface: name.to_owned() };
        match found {
            Ok(Some(message)) => Ok(Link::read(&message)),
            Ok(None) => Err(gone()),
            Err(error) if is(&error, rustix::io::Errno::NODEV) => Err(gone()),
            Err(error) => Err(self.failed(format!("look up {name}"))(error)),
        }
    }

    /// Sets the interface up, with this MTU when one is given.
    pub async fn up(&self, name: &str, index: u32, mtu: Option<u32>) -> Result<(), NetError> {
        let mut change = LinkMessageBuilder::<LinkUnspec>::new().index(index).up();
        if let Some(mtu) = mtu {
            change = change.mtu(mtu);
        }
        let set = self.handle.link().set(change.build()).execute().await;
        set.map_err(self.failed(format!("set {name} up")))
    }
}

impl Link {
    fn read(message: &LinkMessage) -> Self {
        let mut link = Self { index: message.header.index, mac: Vec::new(), mtu: 0 };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Address(mac) => link.mac.clone_from(mac),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                _ => {}
            }
        }
        link
    }
}

/// Whether the kernel answered with this error.
pub(crate) fn is(error: &rtnetlink::Error, errno: rustix::io::Errno) -> bool {
    let code = match error {
        rtnetlink::Error::NetlinkError(message) => message.raw_code(),
        rtnetlink::Error::UnexpectedMessage(message) => match &message.payload {
            NetlinkPayload::Error(message) => message.raw_code(),
            _ => 0,
        },
        _ => 0,
    };
    code == -errno.raw_os_error()
}
