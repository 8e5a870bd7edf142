# Runs its arguments. What they write goes to out.txt, their process to pid.txt, and the most memory that the
# system saw in it (VmHWM) to peak.txt; the exit code is theirs.
"$@" > out.txt 2>&1 &
pid=$!
echo $pid > pid.txt
# A process that has ended has no such line any more, though its number may last.
while line=$(grep VmHWM /proc/$pid/status 2>/dev/null); do
    echo "$line" > peak.txt
    sleep 0.1
done
wait $pid
