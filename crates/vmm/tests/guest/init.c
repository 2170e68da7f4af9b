/* The smallest guest that follows the hello protocol: loads its modules, says hello on the port
 * `agent`, then answers `r` with 16 random bytes, `d` with the size of its disk, `m` with that of its
 * memory, anything else with itself. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#define BLKGETSIZE64 0x80081272

static void load_modules(void)
{
	char name[128], path[160];
	FILE *order = fopen("/modules/order", "r");
	while (order && fgets(name, sizeof name, order)) {
		name[strcspn(name, "\n")] = 0;
		snprintf(path, sizeof path, "/modules/%s", name);
		int file = open(path, O_RDONLY);
		syscall(SYS_finit_module, file, "", 0);
		close(file);
	}
}

static int open_port(const char *wanted)
{
	char path[300], name[64];
	struct dirent *entry;
	DIR *ports = opendir("/sys/class/virtio-ports");
	while (ports && (entry = readdir(ports))) {
		snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
		FILE *file = fopen(path, "r");
		if (!file || !fgets(name, sizeof name, file))
			continue;
		name[strcspn(name, "\n")] = 0;
		snprintf(path, sizeof path, "/dev/%s", entry->d_name);
		if (!strcmp(name, wanted))
			return open(path, O_RDWR | O_NONBLOCK);
	}
	return -1;
}

static void answer(int port, char request)
{
	char random[16];
	unsigned long long size = 0;
	switch (request) {
	case 'r':
		getrandom(random, sizeof random, 0);
		write(port, random, sizeof random);
		break;
	case 'd':
		ioctl(open("/dev/vda", O_RDONLY), BLKGETSIZE64, &size);
		write(port, &size, sizeof size);
		break;
	case 'm': {
		struct sysinfo info;
		sysinfo(&info);
		size = (unsigned long long)info.totalram * info.mem_unit;
		write(port, &size, sizeof size);
		break;
	}
	default:
		write(port, &request, 1);
	}
}

int main(void)
{
	mount("dev", "/dev", "devtmpfs", 0, "");
	mount("sys", "/sys", "sysfs", 0, "");
	load_modules();
	int port = open_port("agent");
	for (;;) {
		struct pollfd wait = { port, POLLOUT, 0 };
		poll(&wait, 1, -1);
		if (wait.revents & POLLHUP) {
			usleep(1000);
			continue;
		}
		write(port, "A3SBOX1\n", 8);
		for (;;) {
			char request;
			wait.events = POLLIN;
			poll(&wait, 1, -1);
			if (wait.revents & POLLHUP)
				break;
			if (read(port, &request, 1) == 1)
				answer(port, request);
		}
	}
}
