//! The joint between the interface CNI made and the tap, and what the guest must know to take the
//! interface's place.
//!
//! Every frame that arrives at one is sent out of the other by a traffic control filter, before the
//! namespace's own network stack sees it. So the guest can have the interface's very MAC and
//! addresses, and the namespace itself answers nothing.

use crate::{
    NetError,
    netlink::{Link, Netlink, is},
};
use a3s_box_types::network::{GuestNetwork, Interface, Neighbour, Route};
use futures::TryStreamExt;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
        RouteProtocol, RouteScope, RouteType, RouteVia,
    },
    tc::{
        TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
        TcActionOption, TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption,
        TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
    },
};
use std::{net::IpAddr, path::Path};

/// `ETH_P_ALL`, in network byte order as traffic control wants it.
const EVERY_PROTOCOL: u16 = 0x0003_u16.to_be();

/// Sends every frame that comes in at `interface` out of `tap` and the other way round. The tap gets
/// the interface's MTU, and both are up afterwards.
pub async fn join(netns: &Path, interface: &str, tap: &str) -> Result<(), NetError> {
    let netlink = Netlink::open(netns)?;
    let (card, cable) = (netlink.link(interface).await?, netlink.link(tap).await?);
    netlink.up(tap, cable.index, Some(card.mtu)).await?;
    redirect(&netlink, interface, &card, &cable).await?;
    redirect(&netlink, tap, &cable, &card).await
}

/// What the guest must be told to take the place of `interface`.
pub async fn guest_network(netns: &Path, interface: &str) -> Result<GuestNetwork, NetError> {
    let netlink = Netlink::open(netns)?;
    let link = netlink.link(interface).await?;
    let mut network = GuestNetwork {
        interfaces: vec![Interface {
            name: interface.to_owned(),
            mac: mac(&link.mac),
            mtu: link.mtu,
            addresses: addresses(&netlink, link.index).await?,
        }],
        ..GuestNetwork::default()
    };
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut question = RouteMessage::default();
        question.header.address_family = family;
        let answers = netlink.handle.route().get(question).execute();
        let routes: Vec<RouteMessage> =
            answers.try_collect().await.map_err(netlink.failed("list routes"))?;
        network
            .routes
            .extend(routes.iter().filter_map(|found| route(found, link.index, interface)));
    }
    let answers = netlink.handle.neighbours().get().execute();
    let neighbours: Vec<NeighbourMessage> =
        answers.try_collect().await.map_err(netlink.failed("list neighbours"))?;
    network
        .neighbours
        .extend(neighbours.iter().filter_map(|found| neighbour(found, link.index, interface)));
    Ok(network)
}

/// Redirects what comes in at one interface to the other one's way out.
async fn redirect(netlink: &Netlink, name: &str, from: &Link, to: &Link) -> Result<(), NetError> {
    let index = i32::try_from(from.index).unwrap_or(i32::MAX);
    match netlink.handle.qdisc().add(index).ingress().execute().await {
        Ok(()) => {}
        // A repeated join.
        Err(error) if is(&error, rustix::io::Errno::EXIST) => {
            let mut old = TcMessage::with_index(index);
            old.header.parent = TcHandle::INGRESS;
            let mut request = netlink.handle.qdisc().del(index);
            *request.message_mut() = old;
            request.execute().await.map_err(netlink.failed(format!("renew queue of {name}")))?;
            let again = netlink.handle.qdisc().add(index).ingress().execute().await;
            again.map_err(netlink.failed(format!("renew queue of {name}")))?;
        }
        Err(error) => return Err(netlink.failed(format!("add queue to {name}"))(error)),
    }
    let failed = netlink.failed(format!("redirect {name}"));
    let by_u32 = netlink.handle.traffic_filter(index).add().parent(INGRESS);
    let by_u32 = by_u32.priority(1).protocol(EVERY_PROTOCOL).redirect(to.index);
    match by_u32.map_err(netlink.failed(format!("redirect {name}")))?.execute().await {
        Ok(()) => Ok(()),
        // A kernel without u32 filters.
        Err(error) if is(&error, rustix::io::Errno::NOENT) => {
            match_all(netlink, index, to.index).await.map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Parent of the filters of an ingress queue: `ffff:0`.
const INGRESS: u32 = 0xffff_0000;

/// The same filter in the form of the newer `matchall` classifier.
async fn match_all(netlink: &Netlink, from: i32, to: u32) -> Result<(), rtnetlink::Error> {
    let mut parameters = TcMirror::default();
    parameters.generic = TcActionGeneric::default();
    parameters.generic.action = TcActionType::Stolen;
    parameters.eaction = TcMirrorActionType::EgressRedir;
    parameters.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            parameters,
        ))]),
    ];
    let mut message = TcMessage::with_index(from);
    message.header.parent = INGRESS.into();
    message.header.info = u32::from(TcHandle { major: 1, minor: EVERY_PROTOCOL });
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![
            action,
        ]))]),
    ];
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let mut answers = netlink.handle.clone().request(request)?;
    while let Some(answer) = futures::StreamExt::next(&mut answers).await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(rtnetlink::Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// The interface's addresses, without the ones its kernel made up from the MAC: the guest's kernel
/// does that too.
async fn addresses(netlink: &Netlink, index: u32) -> Result<Vec<String>, NetError> {
    let answers = netlink.handle.address().get().set_link_index_filter(index).execute();
    let found: Vec<AddressMessage> =
        answers.try_collect().await.map_err(netlink.failed("list addresses"))?;
    let own = |message: &&AddressMessage| {
        message.header.index == index
            && !(message.header.family == AddressFamily::Inet6
                && message.header.scope == AddressScope::Link)
    };
    Ok(found.iter().filter(own).filter_map(address).collect())
}

fn address(message: &AddressMessage) -> Option<String> {
    let mut found: Option<IpAddr> = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link `Address` is the other end.
            AddressAttribute::Local(local) => found = Some(*local),
            AddressAttribute::Address(address) if found.is_none() => found = Some(*address),
            _ => {}
        }
    }
    found.map(|address| format!("{address}/{}", message.header.prefix_len))
}

/// The route, unless it is another table's or interface's, or the kernel's own.
fn route(message: &RouteMessage, index: u32, interface: &str) -> Option<Route> {
    let header = &message.header;
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => [0; 4].into(),
        AddressFamily::Inet6 => [0; 16].into(),
        _ => return None,
    };
    if header.kind != RouteType::Unicast || header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let (mut table, mut out, mut destination) = (u32::from(header.table), None, any);
    let (mut gateway, mut source, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(number) => out = Some(*number),
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (table == u32::from(RouteHeader::RT_TABLE_MAIN) && out == Some(index)).then(|| Route {
        destination: format!("{destination}/{}", header.destination_prefix_length),
        gateway: gateway.map(|address: IpAddr| address.to_string()),
        interface: interface.to_owned(),
        source: source.map(|address| address.to_string()),
        mtu,
        scope: scope(header.scope),
        onlink: header.flags.contains(RouteFlags::Onlink),
    })
}

fn scope(scope: RouteScope) -> u8 {
    u8::from(scope)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage, index: u32, interface: &str) -> Option<Neighbour> {
    if message.header.ifindex != index || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut link) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                address = Some(found.to_string());
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                address = Some(found.to_string());
            }
            NeighbourAttribute::LinkLayerAddress(found) => link = Some(mac(found)),
            _ => {}
        }
    }
    Some(Neighbour { address: address?, mac: link?, interface: interface.to_owned() })
}

fn mac(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}
