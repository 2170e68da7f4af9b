//! The guest's interfaces, addresses, routes and neighbours, by rtnetlink.
//!
//! Synchronous, one request at a time: it runs once per sandbox, on a socket the kernel answers
//! before `recv` could sleep.

use crate::error::{Error, Step};
use a3s_box_api::agent::v1 as api;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
        RouteScope, RouteType,
    },
};
use rustix::{
    fd::OwnedFd,
    net::{AddressFamily as Family, RecvFlags, SendFlags, SocketFlags, SocketType, netlink},
    process::Pid,
};
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr},
};

/// Brings loopback up.
pub fn loopback_up() -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let loopback = links.iter().find(|link| link.loopback).ok_or(io::ErrorKind::NotFound)?;
    netlink.set_link(loopback.index, Vec::new(), true)
}

/// Gives the cards that `network` is about to the network namespace of the process `to`.
pub fn hand_over(network: &api::Network, to: Pid) -> Result<(), Error> {
    let mut netlink = Netlink::open().step("netlink")?;
    let links = netlink.links().step("list the interfaces")?;
    let cards = links.iter().filter(|link| !link.loopback).take(network.interfaces.len());
    for card in cards {
        let to = LinkAttribute::NetNsPid(to.as_raw_nonzero().get() as u32);
        netlink
            .set_link(card.index, vec![to], false)
            .step(format_args!("give {} to the pod", card.name))?;
    }
    Ok(())
}

/// Takes over a pod's network. The first interface of the request is the guest's first, and so on.
pub fn configure(network: &api::Network) -> Result<(), Error> {
    let mut netlink = Netlink::open().step("netlink")?;
    let links = netlink.links().step("list the interfaces")?;
    let mut cards = links.iter().filter(|link| !link.loopback);
    let mut indexes = HashMap::new();
    for wanted in &network.interfaces {
        let what = format!("interface {}", wanted.name);
        let card = cards.next().ok_or_else(|| {
            Error::NotNow(format!("{what}: the guest has no network card for it"))
        })?;
        indexes.insert(wanted.name.as_str(), card.index);
        netlink.interface(card, wanted)?;
    }
    let index = |name: &str, what: &str| {
        let unknown = || Error::invalid(format!("{what}: no interface {name:?}"));
        indexes.get(name).copied().ok_or_else(unknown)
    };
    for neighbour in &network.neighbours {
        let what = format!("neighbour {}", neighbour.address);
        let index = index(&neighbour.interface, &what)?;
        let (address, mac) = (address(&neighbour.address, &what)?, mac(&neighbour.mac, &what)?);
        netlink.neighbour(index, address, mac).step(what)?;
    }
    // Gateways must be reachable before a route may name them.
    let (direct, indirect): (Vec<_>, Vec<_>) =
        network.routes.iter().partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(indirect) {
        let what = format!("route to {}", route.destination);
        let index = index(&route.interface, &what)?;
        let message = route_message(route, index, &what)?;
        netlink.change(RouteNetlinkMessage::NewRoute(message)).step(what)?;
    }
    Ok(())
}

/// Takes away again what [`configure`] has given to the guest's interfaces, and what the kernel has added.
/// They stay up: the driver of a card that is taken down while it still sends now and then waits for ever.
pub fn give_back(network: &api::Network) -> Result<(), Error> {
    let mut netlink = Netlink::open().step("netlink")?;
    let links = netlink.links().step("list the interfaces")?;
    let cards = links.iter().filter(|link| !link.loopback);
    for (card, given) in cards.zip(&network.interfaces) {
        for neighbour in network.neighbours.iter().filter(|one| one.interface == given.name) {
            let what = format!("take neighbour {} from {}", neighbour.address, given.name);
            let address = address(&neighbour.address, &what)?;
            netlink.take_neighbour(card.index, address).step(what)?;
        }
        // Its routes go with the last address.
        let what = format!("take the addresses from {}", given.name);
        for address in netlink.addresses(card.index).step(&what)? {
            netlink.take_address(address).step(&what)?;
        }
    }
    Ok(())
}

struct Link {
    index: u32,
    loopback: bool,
    up: bool,
    name: String,
}

struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        // The default protocol of the family, number 0, is NETLINK_ROUTE.
        let socket =
            rustix::net::socket_with(Family::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// Reads answers to the last request until it is done.
    fn answers(&mut self) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut answers = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let (length, _) = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while !rest.is_empty() {
                let message =
                    NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(|error| {
                        io::Error::new(io::ErrorKind::InvalidData, error.to_string())
                    })?;
                let length = (message.header.length as usize).next_multiple_of(4).max(16);
                rest = rest.get(length..).unwrap_or_default();
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(answers),
                            Some(code) => Err(io::Error::from_raw_os_error(-code.get())),
                        };
                    }
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    _ => {}
                }
            }
        }
    }

    fn change(&mut self, message: RouteNetlinkMessage) -> io::Result<()> {
        self.send(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE)?;
        self.answers().map(drop)
    }

    /// In the order of their numbers, which is the order the machine has them.
    fn links(&mut self) -> io::Result<Vec<Link>> {
        self.send(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let mut links = Vec::new();
        for answer in self.answers()? {
            let RouteNetlinkMessage::NewLink(link) = answer else {
                continue;
            };
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            links.push(Link {
                index: link.header.index,
                loopback: link.header.flags.contains(LinkFlags::Loopback),
                up: link.header.flags.contains(LinkFlags::Up),
                name: name.unwrap_or_default(),
            });
        }
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    fn set_link(&mut self, index: u32, attributes: Vec<LinkAttribute>, up: bool) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        message.attributes = attributes;
        self.send(RouteNetlinkMessage::SetLink(message), NLM_F_ACK)?;
        self.answers().map(drop)
    }

    fn interface(&mut self, card: &Link, wanted: &api::Interface) -> Result<(), Error> {
        let what = format!("interface {}", wanted.name);
        let mut attributes = Vec::new();
        if card.name != wanted.name {
            attributes.push(LinkAttribute::IfName(wanted.name.clone()));
        }
        if !wanted.mac.is_empty() {
            attributes.push(LinkAttribute::Address(mac(&wanted.mac, &what)?));
        }
        if wanted.mtu != 0 {
            attributes.push(LinkAttribute::Mtu(wanted.mtu));
        }
        self.set_link(card.index, attributes, card.up).step(&what)?;
        for text in &wanted.addresses {
            let what = format!("address {text} of {}", wanted.name);
            let (address, prefix) = cidr(text, &what)?;
            self.address(card.index, address, prefix).step(what)?;
        }
        self.set_link(card.index, Vec::new(), true).step(&what)
    }

    /// Those of one interface, whoever gave them.
    fn addresses(&mut self, index: u32) -> io::Result<Vec<AddressMessage>> {
        self.send(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
        let ours = |answer| match answer {
            RouteNetlinkMessage::NewAddress(address) if address.header.index == index => {
                Some(address)
            }
            _ => None,
        };
        Ok(self.answers()?.into_iter().filter_map(ours).collect())
    }

    fn take_address(&mut self, address: AddressMessage) -> io::Result<()> {
        self.send(RouteNetlinkMessage::DelAddress(address), NLM_F_ACK)?;
        self.answers().map(drop)
    }

    fn take_neighbour(&mut self, index: u32, address: IpAddr) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        message.attributes = vec![NeighbourAttribute::Destination(to_neighbour(address))];
        self.send(RouteNetlinkMessage::DelNeighbour(message), NLM_F_ACK)?;
        self.answers().map(drop)
    }

    fn address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = prefix;
        message.header.family = family(address);
        message.attributes =
            vec![AddressAttribute::Address(address), AddressAttribute::Local(address)];
        match address {
            IpAddr::V4(address) => {
                let host_bits = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
                if prefix < 31 {
                    let all = Ipv4Addr::from(u32::from(address) | host_bits);
                    message.attributes.push(AddressAttribute::Broadcast(all));
                }
            }
            IpAddr::V6(address) => {
                // The network namespace has tried it out already.
                message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
                if address.is_unicast_link_local() {
                    message.header.scope = AddressScope::Link;
                }
            }
        }
        self.change(RouteNetlinkMessage::NewAddress(message))
    }

    fn neighbour(&mut self, index: u32, address: IpAddr, mac: Vec<u8>) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(to_neighbour(address)),
            NeighbourAttribute::LinkLayerAddress(mac),
        ];
        self.change(RouteNetlinkMessage::NewNeighbour(message))
    }
}

fn route_message(route: &api::Route, index: u32, what: &str) -> Result<RouteMessage, Error> {
    let (destination, prefix) = cidr(&route.destination, what)?;
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(destination);
    header.destination_prefix_length = prefix;
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = RouteProtocol::Static;
    header.kind = RouteType::Unicast;
    let scope = u8::try_from(route.scope)
        .map_err(|_| Error::invalid(format!("{what}: scope {}", route.scope)))?;
    header.scope = RouteScope::from(scope);
    if route.onlink {
        header.flags |= RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Oif(index));
    if prefix != 0 {
        attributes.push(RouteAttribute::Destination(destination.into()));
    }
    if !route.gateway.is_empty() {
        attributes.push(RouteAttribute::Gateway(address(&route.gateway, what)?.into()));
    }
    if !route.source.is_empty() {
        attributes.push(RouteAttribute::PrefSource(address(&route.source, what)?.into()));
    }
    if route.mtu != 0 {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Ok(message)
}

fn to_neighbour(address: IpAddr) -> NeighbourAddress {
    match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn address(text: &str, what: &str) -> Result<IpAddr, Error> {
    text.parse().map_err(|_| Error::invalid(format!("{what}: {text:?} is not an IP address")))
}

fn cidr(text: &str, what: &str) -> Result<(IpAddr, u8), Error> {
    let wrong =
        || Error::invalid(format!("{what}: {text:?} is not an address with a prefix length"));
    let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let (ip, prefix): (IpAddr, u8) =
        (ip.parse().map_err(|_| wrong())?, prefix.parse().map_err(|_| wrong())?);
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    if prefix > longest { Err(wrong()) } else { Ok((ip, prefix)) }
}

fn mac(text: &str, what: &str) -> Result<Vec<u8>, Error> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+'))
        })
        .collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| Error::invalid(format!("{what}: {text:?} is not a MAC address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_is_no_address_is_refused_and_named() {
        for bad in ["10.0.0.1", "10.0.0.1/33", "x/8", "::/129", "10.0.0.0/-1"] {
            let error = cidr(bad, "route").unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
        assert_eq!(cidr("fd00::1/64", "route").unwrap(), ("fd00::1".parse().unwrap(), 64));
        for bad in ["", "aa:bb:cc:dd:ee", "aa:bb:cc:dd:ee:+f", "aa:bb:cc:dd:ee:ff:00"] {
            assert!(mac(bad, "x").is_err(), "{bad}");
        }
    }
}
